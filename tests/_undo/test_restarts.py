"""Solves that restart, since the flow contracts."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    ALF,
    RecordedRestarts,
    RecordedSteps,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    undo,
)

from ..helpers import jit
from .test_undo import largest


_save = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)
_solvers = (
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(ALF(), id="ALF"),
    pytest.param(Reversible(diffrax.Tsit5()), id="Tsit5 coupled"),
    pytest.param(ReversibleALF2(), id="ALF2", marks=pytest.mark.slow),
    pytest.param(ReversibleALF6(), id="ALF6", marks=pytest.mark.slow),
)


def _friction(t, y, args):
    return jnp.stack([y[1], -jnp.sin(y[0]) - args * y[1]])


def _van_der_pol(t, y, args):
    return jnp.stack([y[1], args * (1 - y[0] ** 2) * y[1] - y[0]])


def _relaxation(t, y, args):
    return -args * (y - jnp.stack([jnp.cos(t), jnp.sin(2 * t)]))


_problems = (
    pytest.param(_friction, 0.5, 40.0, id="friction"),
    pytest.param(_relaxation, 1.0, 40.0, id="relaxation"),
    pytest.param(_van_der_pol, 1.0, 20.0, id="van der Pol"),
)


def _solve(field, solver, t1, y0, args, controller):
    return diffrax.diffeqsolve(
        *(diffrax.ODETerm(field), solver, 0.0, t1, 0.1, y0, args),
        saveat=_save,
        stepsize_controller=controller,
        max_steps=4096,
    )


@pytest.mark.parametrize("solver", _solvers)
@pytest.mark.parametrize("field, args, t1", _problems)
def test_contracting(solver, field, args, t1):
    """What has been forgotten by `e^(-20)` and more is found again."""
    # A solver of low order is for low accuracy.
    low = isinstance(solver, ALF | ReversibleALF2)
    tolerance, solver = 1e-3 if low else 1e-6, RecordedRestarts(solver, 1024)
    pid = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    controller = RecordedSteps(pid, 4096)

    @jit
    def there_and_back(y0):
        end = _solve(field, solver, t1, y0, args, controller)
        options = dict(stepsize_controller=controller)
        start = undo(diffrax.ODETerm(field), solver, end, None, args, **options)
        numbers = (end.stats["num_accepted_steps"], end.solver_state.record.count)
        return start.ys[-1], numbers

    y0 = jnp.array([1.3, 0.4])
    found, (steps, restarts) = there_and_back(y0)
    print(f"{steps} steps, {restarts} restarts: {largest(found, y0)}")
    assert 0 < restarts < steps
    assert largest(found, y0) < 1e-9


def test_batch():
    """Of solves with unequal numbers of restarts."""
    solver = RecordedRestarts(ReversibleALF4(), 64)
    controller = RecordedSteps(diffrax.PIDController(rtol=1e-5, atol=1e-5), 1024)

    def there_and_back(y0, args):
        end = _solve(_friction, solver, 20.0, y0, args, controller)
        options = dict(stepsize_controller=controller)
        start = undo(diffrax.ODETerm(_friction), solver, end, None, args, **options)
        return start.ys[-1], end.solver_state.record.count

    y0, args = jr.normal(jr.PRNGKey(0), (16, 2)), jnp.linspace(0.0, 1.5, 16)
    found, restarts = jax.jit(jax.vmap(there_and_back))(y0, args)
    print(restarts, largest(found, y0))
    assert len(set(restarts.tolist())) > 3
    assert largest(found, y0) < 1e-9


def _undo_relaxation(solver, t1, terms=None, args=1.0, **kwargs):
    y0 = jnp.array([1.3, 0.4])
    controller = RecordedSteps(diffrax.PIDController(rtol=1e-6, atol=1e-6), 4096)

    @jit
    def there_and_back(y0):
        end = _solve(_relaxation, solver, t1, y0, 1.0, controller)
        options = dict(stepsize_controller=controller) | kwargs
        terms_ = diffrax.ODETerm(_relaxation) if terms is None else terms
        return undo(terms_, solver, end, None, args, **options).ys[-1]

    return there_and_back(y0)


def test_forgotten():
    with pytest.raises(Exception, match="RecordedRestarts"):
        _undo_relaxation(ReversibleALF4(), 40.0)


def test_no_room():
    with pytest.raises(Exception, match="capacity=...\\)` larger than 2"):
        _undo_relaxation(RecordedRestarts(ReversibleALF4(), 2), 40.0)


def test_drifted_apart():
    """Without restarts the solution itself is wrong."""
    controller = RecordedSteps(diffrax.ConstantStepSize(), 4096)
    solver, y0 = Reversible(diffrax.Tsit5(), restart=None), jnp.array([1.3, 0.4])

    @jit
    def there_and_back(y0):
        end = _solve(_relaxation, solver, 40.0, y0, 1.0, controller)
        options = dict(stepsize_controller=controller)
        terms = diffrax.ODETerm(_relaxation)
        return undo(terms, solver, end, 0.1, 1.0, **options).ys[-1]

    with pytest.raises(Exception, match="The solution is wrong"):
        there_and_back(y0)


def test_another_problem():
    """The steps of another vector field lead elsewhere."""
    solver = RecordedRestarts(ReversibleALF4())
    with pytest.raises(Exception, match="has not found the start"):
        _undo_relaxation(solver, 2.0, args=1.1)
    found = _undo_relaxation(solver, 2.0, args=1.1, on_failure="nan")
    assert bool(jnp.all(jnp.isnan(found)))
    with pytest.warns(UserWarning, match="has not found the start"):
        found = _undo_relaxation(solver, 2.0, args=1.1, on_failure="warn")
        found.block_until_ready()
    assert bool(jnp.all(jnp.isfinite(found)))
    found = _undo_relaxation(solver, 2.0, args=1.1, reversal_rtol=float("inf"))
    assert bool(jnp.all(jnp.isfinite(found)))


def test_another_problem_before_a_restart():
    """Seen where the solution was kept, although nothing is to be seen at the start."""
    start = jnp.array(1.5)
    field = lambda t, y, args: jnp.where(t < start, 1.0, args) * _relaxation(t, y, 1.0)
    solver = RecordedRestarts(ReversibleALF4(restart=1e-6), 256)
    terms = diffrax.ODETerm(field)
    with pytest.raises(Exception, match="before a restart"):
        _undo_relaxation(solver, 3.0, terms=terms, args=1.1)


def test_record():
    """The steps, and the solver state but for the record, are those of the solver."""
    y0, controller = jnp.array([1.3, 0.4]), diffrax.PIDController(rtol=1e-5, atol=1e-5)
    plain, wrapped = ReversibleALF4(), RecordedRestarts(ReversibleALF4(), 3)
    ends = [
        _solve(_relaxation, solver, 40.0, y0, 1.0, controller)
        for solver in (plain, wrapped)
    ]
    states = [end.solver_state for end in ends]
    record = states[1].record
    assert states[0].record is None
    assert record.count > 3 and record.capacity == 3
    assert bool(jnp.all(record.ages > 0))
    first, second = (
        jtu.tree_leaves((end.ys, state.copy, state.age, end.stats))
        for end, state in zip(ends, states)
    )
    assert all(bool(jnp.all(a == b)) for a, b in zip(first, second))


def test_refused():
    with pytest.raises(ValueError, match="made of updates"):
        RecordedRestarts(diffrax.ReversibleHeun())  # pyright: ignore
    with pytest.raises(ValueError, match="must be an integer that is at least 1"):
        RecordedRestarts(ReversibleALF4(), 0)
