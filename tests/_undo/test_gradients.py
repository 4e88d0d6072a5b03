"""Derivatives of solves that are undone."""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    ALF,
    RecordedRestarts,
    RecordedSteps,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
    undo,
)

from ..helpers import (
    directional_difference,
    jit,
    normal_like,
    parameters,
    quick,
    term,
)


_save = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)
_solvers = (
    pytest.param(RecordedRestarts(ReversibleALF4()), id="ALF4", marks=pytest.mark.slow),
    pytest.param(
        RecordedRestarts(ReversibleALF4(restart=1e-6), 128), id="ALF4 restarting"
    ),
    pytest.param(RecordedRestarts(ALF(), 128), id="ALF", marks=pytest.mark.slow),
    pytest.param(
        RecordedRestarts(Reversible(diffrax.Tsit5())),
        id="Tsit5 coupled",
        marks=pytest.mark.slow,
    ),
    pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun"),
    pytest.param(
        diffrax.LeapfrogMidpoint(), id="LeapfrogMidpoint", marks=pytest.mark.slow
    ),
)


def _there_and_back(solver, adjoint, controller, dt0, p, interval=(0.3, 1.9)):
    problem = (term(p), solver)
    options = dict(stepsize_controller=controller, adjoint=adjoint, max_steps=256)
    rest = (dt0, p["y0"], p["args"])
    end = diffrax.diffeqsolve(*problem, *interval, *rest, saveat=_save, **options)
    start = undo(*problem, end, dt0, p["args"], **options)
    return jtu.tree_map(lambda y: y[-1], start.ys)


@pytest.mark.parametrize("solver", _solvers)
@pytest.mark.parametrize(
    "adjoint",
    (
        ReversibleAdjoint(checkpoints=128),
        pytest.param(diffrax.RecursiveCheckpointAdjoint(), marks=pytest.mark.slow),
        pytest.param(diffrax.ForwardMode(), marks=pytest.mark.slow),
    ),
    ids=lambda x: type(x).__name__,
)
def test_round_trip_is_the_identity(solver, adjoint):
    """In `y0`, and a constant in everything else."""
    p = parameters()
    flat, unravel = jfu.ravel_pytree(p)
    true, _ = jfu.ravel_pytree(p["y0"])
    select = jax.jacobian(lambda x: jfu.ravel_pytree(unravel(x)["y0"])[0])(flat)
    controller, dt0 = diffrax.ConstantStepSize(), 0.05
    if not isinstance(solver, diffrax.LeapfrogMidpoint):
        pid = diffrax.PIDController(rtol=1e-4, atol=1e-4)
        controller, dt0 = RecordedSteps(pid, 256), None

    def f(x):
        ys = _there_and_back(solver, adjoint, controller, dt0, unravel(x))
        return jfu.ravel_pytree(ys)[0]

    forward = (
        [] if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint) else [jax.jacfwd]
    )
    reverse = [] if isinstance(adjoint, diffrax.ForwardMode) else [jax.jacrev]
    assert jnp.max(jnp.abs(jit(f)(flat) - true)) < 1e-12
    for jacobian in (*forward, *reverse):
        error = jnp.max(jnp.abs(jit(jacobian(f))(flat) - select))
        print(f"{jacobian.__name__}: {error}")
        assert error < 1e-10


@pytest.mark.parametrize("solver", quick(_solvers, "ALF4 restarting"))
def test_round_trip_in_times(solver):
    """Whenever the solve starts and ends, it is undone to the same start."""
    p, pid = parameters(), diffrax.PIDController(rtol=1e-4, atol=1e-4)
    controller, dt0 = RecordedSteps(pid, 256), None
    if isinstance(solver, diffrax.LeapfrogMidpoint):
        nodes = 0.3 + 1.6 * jnp.linspace(0.0, 1.0, 30)
        controller = RecordedSteps(diffrax.StepTo(nodes.at[-1].set(1.9)), 256)

    def f(interval):
        # The place of each step is that of the solve, relative to the two times.
        args = (solver, ReversibleAdjoint(checkpoints=128), controller, dt0)
        ys = _there_and_back(*args, p, interval)
        return jfu.ravel_pytree(ys)[0]

    interval = (jnp.array(0.3), jnp.array(1.9))
    for jacobian in (jax.jacfwd, jax.jacrev):
        for error in jit(jacobian(f))(interval):
            assert jnp.max(jnp.abs(error)) < 1e-10


@pytest.mark.slow
def test_second_derivatives():
    """Of a round trip there are none."""
    p = parameters()
    flat, unravel = jfu.ravel_pytree(p)
    solver = RecordedRestarts(ReversibleALF4(restart=1e-6), 64)
    steps = (diffrax.ConstantStepSize(), 0.05)

    def f(x):
        args = (solver, ReversibleAdjoint(checkpoints=64), *steps)
        ys = _there_and_back(*args, unravel(x))
        return jnp.sum(jnp.sin(jfu.ravel_pytree(ys)[0]))

    def true(x):
        return jnp.sum(jnp.sin(jfu.ravel_pytree(unravel(x)["y0"])[0]))

    found, expected = (jit(jax.jacfwd(jax.grad(g)))(flat) for g in (f, true))
    assert jnp.max(jnp.abs(found - expected)) < 1e-9


@pytest.mark.parametrize("solver", _solvers)
def test_finite_differences(solver):
    """In the end of the solve, its solver state, and the parameters of the way back."""
    p = parameters()

    def solve(p):
        rest = (0.3, 1.9, 0.1, p["y0"], p["args"])
        return diffrax.diffeqsolve(term(p), solver, *rest, saveat=_save, max_steps=64)

    end = solve(p)
    variables, fixed = jtu.tree_flatten((end.ys, end.solver_state))
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in variables]

    def f(floats, p):
        floats = iter(floats)
        leaves = [next(floats) if b else x for x, b in zip(variables, is_float)]
        ys, solver_state = jtu.tree_unflatten(fixed, leaves)
        where = lambda s: (s.ys, s.solver_state)
        solution = eqx.tree_at(where, end, (ys, solver_state))
        start = undo(
            *(term(p), solver, solution, 0.1, p["args"]), reversal_rtol=jnp.inf
        )
        return jnp.sum(jnp.sin(jfu.ravel_pytree(start.ys)[0]))

    x = ([v for v, b in zip(variables, is_float) if b], p)
    direction = normal_like(x, 5)
    found = jit(lambda x, dx: jax.jvp(f, x, dx)[1])(x, direction)
    gradient = jit(jax.grad(lambda x: f(*x)))(x)
    pairs = zip(*map(jtu.tree_leaves, (gradient, direction)))
    reverse = sum(jnp.sum(a * b) for a, b in pairs)
    at = jit(lambda x: f(*x))
    true = directional_difference(at, x, direction)
    print(found, reverse, true)
    assert abs(found - reverse) < 1e-10 * abs(found)
    assert abs(found - true) < 1e-7 * abs(true)


def test_given_steps_are_not_differentiated():
    p, solver = parameters(), diffrax.ReversibleHeun()

    def f(dt0):
        rest = (0.3, 1.9, 0.1, p["y0"], p["args"])
        end = diffrax.diffeqsolve(term(p), solver, *rest, saveat=_save)
        start = undo(term(p), solver, end, dt0, p["args"])
        return jnp.sum(start.ys["a"])

    with pytest.raises(RuntimeError, match="with respect to `dt0`"):
        jax.grad(f)(0.1)


def test_memory_does_not_grow():
    """That of a gradient, with the number of steps."""
    p, solver = parameters(), ReversibleALF4(restart=None)

    def memory(steps):
        def f(y0):
            rest = (0.0, 1.0, 1 / steps, y0, p["args"])
            options = dict(max_steps=steps, adjoint=ReversibleAdjoint())
            end = diffrax.diffeqsolve(term(p), solver, *rest, saveat=_save, **options)
            start = undo(term(p), solver, end, 1 / steps, p["args"])
            return jnp.sum(start.ys["a"])

        compiled = jax.jit(jax.grad(f)).lower(p["y0"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = memory(16), memory(4096)
    print(few, many)
    assert many < 1.1 * few
