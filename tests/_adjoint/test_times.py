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

from ..helpers import adjoint_of, directional_difference, jit, tree_difference


_SOLVERS = (
    pytest.param(ReversibleALF2(), id="ALF2", marks=pytest.mark.slow),
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(
        ReversibleALF4(interpolation="hermite", damping=0.3),
        id="hermite",
        marks=pytest.mark.slow,
    ),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=pytest.mark.slow),
    pytest.param(diffrax.ReversibleHeun(), id="Heun", marks=pytest.mark.slow),
    pytest.param(diffrax.LeapfrogMidpoint(), id="leapfrog", marks=pytest.mark.slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
)


def _vector_field(t, y, args):
    return jnp.stack([y[1], -args * jnp.sin(y[0]) + 0.3 * jnp.cos(2 * t)])


def _loss(times, y0, args, solver, controller, adjoint, **options):
    t0, t1, dt0, ts = times
    saveat = diffrax.SaveAt(
        subs=[
            diffrax.SubSaveAt(t1=True, ts=ts, fn=lambda t, y, args: t * y**2),
            diffrax.SubSaveAt(steps=2, fn=lambda t, y, args: jnp.cos(t * y)),
            diffrax.SubSaveAt(t0=True, ts=ts),
        ],
        dense=True,
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_vector_field),
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=64,
        **options,
    )
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
    total = sum(jnp.sum(finite(y)) for y in solution.ys)
    total = total + sum(jnp.sum(finite(t) ** 2) for t in solution.ts)
    return total + jnp.sum(solution.evaluate((t0 + 2 * t1) / 3))


_TS = jnp.array([0.35, 0.9, 1.2])
_TIMES = (0.1, 1.9, 0.11, _TS)
_Y0, _ARGS = jnp.array([1.0, 0.5]), 1.3


@pytest.mark.parametrize("solver", _SOLVERS)
def test_constant_steps(solver):
    """What differentiating diffrax's own loop gives, in reverse and forward mode."""
    controller = diffrax.ConstantStepSize()

    @jit
    def grads(*x):
        adjoints = (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint())
        return [
            jax.grad(_loss, (0, 1, 2))(*x, solver, controller, adjoint)
            for adjoint in adjoints
        ]

    @jit
    def tangents(*x):
        f = lambda *x: _loss(*x, solver, controller, adjoint_of(solver))
        return jax.jvp(f, x, x)[1]

    x = jax.tree.map(jnp.asarray, (_TIMES, _Y0, _ARGS))
    grad, true_grad = grads(*x)
    assert tree_difference(grad, true_grad) < 1e-10
    pairs = zip(jax.tree.leaves(true_grad), jax.tree.leaves(x))
    true_tangent = sum(jnp.vdot(g, v) for g, v in pairs)
    assert abs(tangents(*x) - true_tangent) < 1e-10 * abs(true_tangent)


@pytest.mark.parametrize("interval", ((0.1, 1.9), (1.9, 0.1)))
@pytest.mark.parametrize("solver", _SOLVERS[1:4])
def test_frozen_relative_nodes(solver, interval):
    nodes = jnp.array([0.0, 0.05, 0.13, 0.2, 0.31, 0.5, 0.62, 0.8, 0.9, 1.0])
    ts = _TS if interval[0] < interval[1] else _TS[::-1]

    def f(times, freeze):
        t0, t1, ts = times
        ts_steps = (t0 + (t1 - t0) * nodes).at[-1].set(t1)
        ts_steps = jax.lax.stop_gradient(ts_steps) if freeze else ts_steps
        controller = diffrax.StepTo(ts_steps)
        times = (t0, t1, None, ts)
        return _loss(times, _Y0, _ARGS, solver, controller, ReversibleAdjoint())

    times = (*interval, ts)
    grad = jit(jax.grad(lambda times: f(times, True)))(times)
    direction = (0.7, -0.4, jnp.array([0.3, -0.9, 0.5]))
    found = sum(jnp.vdot(a, b) for a, b in zip(grad, direction))
    move = jit(lambda times: f(times, False))
    true = directional_difference(move, times, direction, 1e-3)
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

    y1 = jit(end)(0.1, 1.5)
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


def test_with_an_event():
    """The end of the interval does not matter where an event ends the solve."""

    def loss(t0, t1, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            ReversibleALF4(),
            t0,
            t1,
            0.05,
            _Y0,
            _ARGS,
            event=diffrax.Event(
                lambda t, y, args, **kwargs: y[0] - 0.4 + 0.1 * t,
                optx.Newton(1e-12, 1e-12),
            ),
            adjoint=adjoint,
            max_steps=128,
        )
        return jnp.sum(solution.ys**2) + jnp.sum(solution.ts)

    @jit
    def grads(t0, t1):
        adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(loss, (0, 1))(t0, t1, adjoint) for adjoint in adjoints]

    grad, true_grad = grads(0.1, 5.1)
    assert tree_difference(grad, true_grad) < 1e-9


def test_batched_save_times():
    """Each element of a batch has its own interval and save times."""

    def loss(t0, t1, ts, args, adjoint):
        times = (t0, t1, 0.13, ts)
        return _loss(
            times, _Y0, args, ReversibleALF4(), diffrax.ConstantStepSize(), adjoint
        )

    x = (
        jnp.array([0.1, 0.2]),
        jnp.array([1.9, 1.4]),
        jnp.array([[0.35, 0.9, 1.2], [0.3, 0.4, 1.39]]),
    )

    @jit
    def grads(*x):
        total = lambda *x: jnp.sum(jax.vmap(loss, (0, 0, 0, None, None))(*x))
        adjoints = (ReversibleAdjoint(), diffrax.DirectAdjoint())
        return [jax.grad(total, (0, 1, 2, 3))(*x, a) for a in adjoints]

    grad, true_grad = grads(*x, jnp.array(1.3))
    assert tree_difference(grad, true_grad) < 1e-10
