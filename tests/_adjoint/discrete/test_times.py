"""Derivatives with respect to times."""

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
)

from ..._reversal.third_party import OnlyBackwardStep
from ...helpers import (
    adjoint_of,
    directional_difference,
    evaluate,
    jit,
    leaf_differences,
    tree_difference,
    UNROLLED,
)
from ...reference import Problem, unrolled


_slow = pytest.mark.slow
_SOLVERS = (
    pytest.param(ReversibleALF2(), id="ALF2"),
    pytest.param(ReversibleALF4(), id="ALF4", marks=_slow),
    pytest.param(
        ReversibleALF4(interpolation="hermite", restart=1e-6), id="hermite", marks=_slow
    ),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=_slow),
    pytest.param(diffrax.ReversibleHeun(), id="Heun"),
    pytest.param(diffrax.LeapfrogMidpoint(), id="leapfrog"),
    pytest.param(OnlyBackwardStep(), id="backward_step", marks=_slow),
    pytest.param(diffrax.Bosh3(), id="Bosh3"),
)


def _vector_field(t, y, args):
    return jnp.stack([y[1], -args * jnp.sin(y[0]) + 0.3 * jnp.cos(2 * t)])


def _terms(p):
    del p
    return diffrax.ODETerm(_vector_field)


def _loss(times, y0, args, solver, controller, adjoint):
    t0, t1, dt0, ts = times
    saveat = diffrax.SaveAt(
        subs=[
            diffrax.SubSaveAt(t1=True, ts=ts, fn=lambda t, y, args: t * y**2),
            diffrax.SubSaveAt(steps=2, fn=lambda t, y, args: jnp.cos(t * y)),
            diffrax.SubSaveAt(t0=True, ts=ts),
        ],
        dense=True,
    )
    rest = (t0, t1, dt0, y0, args)
    options = dict(saveat=saveat, stepsize_controller=controller, max_steps=64)
    if adjoint is UNROLLED:
        solution = unrolled(Problem(_terms, solver), {}, *rest, **options)
    else:
        options |= dict(adjoint=adjoint)
        solution = diffrax.diffeqsolve(_terms({}), solver, *rest, **options)
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
    total = sum(jnp.sum(finite(y)) for y in solution.ys)
    total = total + sum(jnp.sum(finite(t) ** 2) for t in solution.ts)
    return total + jnp.sum(evaluate(solution, jnp.stack([(t0 + 2 * t1) / 3])))


_TS = jnp.array([0.35, 0.9, 1.2])
_TIMES = tuple(map(jnp.asarray, (0.1, 1.9, 0.11, _TS)))
_BACKWARD = tuple(map(jnp.asarray, (1.8, 0.2, -0.11, _TS[::-1])))
_Y0, _ARGS = jnp.array([1.0, 0.5]), jnp.array(1.3)


@pytest.mark.parametrize("solver", _SOLVERS)
def test_constant_steps(solver):
    """The steps of `ConstantStepSize` move as diffrax makes them."""
    f = lambda *x: _loss(*x, solver, diffrax.ConstantStepSize(), adjoint_of(solver))
    grad = jit(jax.grad(f, (0, 1, 2)))
    reference = jax.grad(_loss, (0, 1, 2))
    for times in (_TIMES, _BACKWARD):
        x = (times, _Y0, _ARGS)
        true = reference(*x, solver, diffrax.ConstantStepSize(), UNROLLED)
        assert leaf_differences(grad(*x), true) < 1e-10


def test_forward_mode():
    x = (_TIMES, _Y0, _ARGS)
    solver, controller = ReversibleALF2(), diffrax.ConstantStepSize()
    f = lambda *x: _loss(*x, solver, controller, ReversibleAdjoint())
    _, found = jit(lambda *x: jax.jvp(f, x, x))(*x)
    grad = jax.grad(_loss, (0, 1, 2))(*x, solver, controller, UNROLLED)
    pairs = zip(jax.tree.leaves(grad), jax.tree.leaves(x))
    true = sum(jnp.vdot(g, v) for g, v in pairs)
    assert abs(found - true) < 1e-10 * abs(true)


_NODES = jnp.array([0.0, 0.05, 0.13, 0.2, 0.31, 0.5, 0.62, 0.8, 0.9, 1.0])


def _step_to(t0, t1):
    nodes = (t0 + (t1 - t0) * _NODES).at[0].set(t0).at[-1].set(t1)
    return diffrax.StepTo(jax.lax.stop_gradient(nodes))


def _adaptive(t0, t1):
    del t0, t1
    return diffrax.PIDController(rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "solver, controller",
    (
        pytest.param(ReversibleALF2(), _step_to, id="ALF2-StepTo", marks=_slow),
        pytest.param(diffrax.Bosh3(), _adaptive, id="Bosh3-PID", marks=_slow),
        pytest.param(ReversibleALF2(), _adaptive, id="ALF2-PID"),
        pytest.param(diffrax.ReversibleHeun(), _adaptive, id="Heun-PID", marks=_slow),
        pytest.param(OnlyBackwardStep(), _step_to, id="backward_step", marks=_slow),
        pytest.param(Reversible(diffrax.Tsit5()), _step_to, id="coupled", marks=_slow),
    ),
)
def test_all_other_steps_keep_their_places(solver, controller):
    """Relative to both ends, as the reference moves them; and as `StepTo` does whose
    nodes are moved by hand."""

    def f(times, adjoint):
        t0, t1, ts = times
        times = (t0, t1, None, ts)
        return _loss(times, _Y0, _ARGS, solver, controller(t0, t1), adjoint)

    grad = jit(jax.grad(lambda times: f(times, adjoint_of(solver))))
    for t0, t1, _, ts in (_TIMES, _BACKWARD):
        true = jax.grad(f)((t0, t1, ts), UNROLLED)
        assert leaf_differences(grad((t0, t1, ts)), true) < 1e-9

    def move(times):
        t0, t1, ts = times
        nodes = (t0 + (t1 - t0) * _NODES).at[-1].set(t1)
        times = (t0, t1, None, ts)
        return _loss(times, _Y0, _ARGS, solver, diffrax.StepTo(nodes), UNROLLED)

    if controller is _step_to:
        direction = (0.7, -0.4, jnp.array([0.3, -0.9, 0.5]))
        found = sum(map(jnp.vdot, grad((*_TIMES[:2], _TS)), direction))
        true = directional_difference(move, (*_TIMES[:2], _TS), direction, 1e-3)
        assert abs(found - true) < 1e-6 * abs(true)


@pytest.mark.parametrize("adaptive", (False, True))
def test_end_moves_with_the_vector_field(adaptive):
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    controller = controller if adaptive else diffrax.ConstantStepSize()

    def end(t0, t1):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            ReversibleALF4(),
            t0,
            t1,
            None if adaptive else 0.01,
            _Y0,
            _ARGS,
            stepsize_controller=controller,
            adjoint=ReversibleAdjoint(),
        )
        return solution.ys[-1]

    y1 = end(0.1, 1.5)
    by_t0, by_t1 = jit(jax.jacrev(end, (0, 1)))(0.1, 1.5)
    assert tree_difference(by_t1, _vector_field(1.5, y1, _ARGS)) < 1e-6
    # The flow carries `-f` at the start to the end.
    carry = lambda y0: diffrax.diffeqsolve(
        diffrax.ODETerm(_vector_field),
        diffrax.Dopri8(),
        0.1,
        1.5,
        0.01,
        y0,
        _ARGS,
        adjoint=diffrax.ForwardMode(),
    ).ys[-1]
    start = -_vector_field(0.1, _Y0, _ARGS)
    _, true = jit(lambda y, v: jax.jvp(carry, (y,), (v,)))(_Y0, start)
    assert tree_difference(by_t0, true) < 1e-6


@pytest.mark.slow
def test_with_an_event():
    """The end of the interval does not matter where an event ends the solve, which starts
    it later and makes other steps."""

    def loss(t0, t1):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            ReversibleALF2(),
            t0,
            t1,
            0.05,
            _Y0,
            _ARGS,
            event=diffrax.Event(
                lambda t, y, args, **kwargs: y[0] - 0.4 + 0.1 * t,
                optx.Newton(1e-12, 1e-12),
            ),
            adjoint=ReversibleAdjoint(),
            max_steps=128,
        )
        return jnp.sum(solution.ys**2) + jnp.sum(solution.ts)

    x, direction = (0.1, 5.11), (0.3, -0.2)
    found = sum(map(jnp.vdot, jit(jax.grad(loss, (0, 1)))(*x), direction))
    value = jit(loss)
    true = directional_difference(lambda x: value(*x), x, direction, 1e-4)
    assert abs(found - true) < 1e-6 * abs(true)
