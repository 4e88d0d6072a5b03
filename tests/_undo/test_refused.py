"""What is missing of a solve, or cannot be undone."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
import pytest

from diffrax_reversible import (
    EES25,
    RecordedRestarts,
    RecordedSteps,
    ReversibleALF4,
    ReversibleALF6,
    undo,
)

from .test_undo import largest, pendulum


_solver = ReversibleALF4()
_terms, _y0 = pendulum(_solver)
_end = diffrax.SaveAt(t1=True, solver_state=True)


def _solve(saveat=_end, solver=_solver, dt0=0.1, **options):
    return diffrax.diffeqsolve(
        *(_terms, solver, 0.0, 2.0, dt0, _y0, 1.3), saveat=saveat, **options
    )


@pytest.mark.parametrize(
    "saveat, message",
    (
        (diffrax.SaveAt(t1=True), "needs the solver state of `ReversibleALF4`"),
        (diffrax.SaveAt(dense=True), "needs the solution at the end"),
        (
            diffrax.SaveAt(subs={"end": diffrax.SubSaveAt(t1=True)}, solver_state=True),
            "needs the solution at the end",
        ),
        (
            diffrax.SaveAt(t1=True, fn=lambda t, y, args: y[:1], solver_state=True),
            "without a `fn`",
        ),
    ),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_not_saved(saveat, message):
    terms = diffrax.ODETerm(lambda t, y, args: -args * jnp.sin(y))
    solution = diffrax.diffeqsolve(
        terms, _solver, 0.0, 2.0, 0.1, _y0, 1.3, saveat=saveat
    )
    with pytest.raises(ValueError, match=message):
        undo(terms, _solver, solution, 0.1, 1.3)


@pytest.mark.parametrize(
    "other",
    (
        ReversibleALF4(restart=None),
        ReversibleALF4(grid=2.0**-40),
        RecordedRestarts(_solver),
        diffrax.ReversibleHeun(),
    ),
    ids=lambda x: type(x).__name__,
)
def test_another_solver(other):
    with pytest.raises(ValueError, match="solver state is not one of"):
        undo(_terms, other, _solve(), 0.1, 1.3)


def test_not_reversible():
    with pytest.raises(ValueError, match="`undo` cannot undo the steps of `Tsit5`"):
        undo(_terms, diffrax.Tsit5(), _solve(solver=diffrax.Tsit5()), 0.1, 1.3)


def test_steps_unknown():
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    solution = _solve(stepsize_controller=pid)
    with pytest.raises(ValueError, match=r"RecordedSteps\(PIDController\(...\)\)"):
        undo(_terms, _solver, solution, 0.1, 1.3, stepsize_controller=pid)
    recorded = RecordedSteps(pid)
    solution = _solve(stepsize_controller=recorded)
    with pytest.raises(ValueError, match="controller_state=True"):
        undo(_terms, _solver, solution, 0.1, 1.3, stepsize_controller=recorded)
    with pytest.raises(ValueError, match="needs the `dt0` of the solve"):
        undo(_terms, _solver, _solve(), None, 1.3)


def test_not_the_end_of_a_step():
    root_finder = optx.Newton(1e-6, 1e-6)
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0], root_finder=root_finder)
    for solution in (
        _solve(event=event),
        _solve(diffrax.SaveAt(ts=jnp.array([0.5, 1.23]), solver_state=True)),
        _solve(diffrax.SaveAt(steps=True, solver_state=True)),
    ):
        with pytest.raises(Exception, match="not given the end of a step"):
            undo(_terms, _solver, solution, 0.1, 1.3)


def test_steps_of_another_solve():
    controller = RecordedSteps(diffrax.PIDController(rtol=1e-3, atol=1e-3), 64)
    saveat = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)
    solution = _solve(saveat, stepsize_controller=controller)
    solution = eqx.tree_at(lambda s: s.t0, solution, jnp.array(-1.0))
    with pytest.raises(Exception, match="do not start where the solve did"):
        undo(_terms, _solver, solution, None, 1.3, stepsize_controller=controller)


def test_not_to_be_saved():
    for kwargs in (dict(controller_state=True), dict(made_jump=True)):
        saveat = diffrax.SaveAt(t1=True, **kwargs)
        with pytest.raises(ValueError, match="nothing is left of them"):
            undo(_terms, _solver, _solve(), 0.1, 1.3, saveat=saveat)


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
def test_ito():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jr.PRNGKey(0))
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * y, path)
    problem = (diffrax.MultiTerm(drift, noise), ReversibleALF6())
    solution = diffrax.diffeqsolve(*problem, 0.0, 1.0, 0.1, _y0, saveat=_end)
    with pytest.raises(ValueError, match="converges to the Stratonovich solution"):
        undo(*problem, solution, 0.1)


def test_jumps_of_reversible_heun():
    terms = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 0.7, -y, y))
    solver = diffrax.ReversibleHeun()
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    clip = diffrax.ClipStepSizeController(pid, jump_ts=jnp.array([0.7]))
    controller = RecordedSteps(clip, 64)
    saveat = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)
    options = dict(stepsize_controller=controller)
    solution = diffrax.diffeqsolve(
        terms, solver, 0.0, 1.0, 0.1, _y0, saveat=saveat, **options
    )
    with pytest.raises(NotImplementedError, match="jumps"):
        undo(terms, solver, solution, **options)


def test_solver_state_passed():
    """The start cannot be checked, and is found."""
    solver = diffrax.ReversibleHeun()
    yhat = _y0 + 0.1
    state = (yhat, _terms.vf(0.0, yhat, 1.3))
    solution = _solve(solver=solver, solver_state=state)
    back = (_terms, solver, solution, 0.1, 1.3)
    with pytest.raises(Exception, match="given a `solver_state` at its start"):
        undo(*back)
    assert largest(undo(*back, reversal_rtol=jnp.inf).ys[-1], _y0) < 1e-13


def test_nearly_reversible_far_from_the_start():
    """Steps so large that a correction does not help are not accepted in silence."""
    solution = _solve(solver=EES25(), dt0=2.0)
    back = (_terms, EES25(), solution, 2.0, 1.3)
    with pytest.raises(Exception, match="has not found the start of the solve"):
        undo(*back)
