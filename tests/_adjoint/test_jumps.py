"""Jumps of the vector field."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    RecordedSteps,
    ReplayedSteps,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
)

from ..helpers import adjoint_of, jit, pairwise_or_product, tree_difference


_JUMPS = jnp.array([0.45, 0.9, 1.3])
_SOLVERS = (
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(ReversibleALF4(damping=0.5), id="damped", marks=pytest.mark.slow),
    pytest.param(ALF(), id="MALI", marks=pytest.mark.slow),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=pytest.mark.slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
)


def _vector_field(t, y, args):
    piece = jnp.searchsorted(_JUMPS, t)
    size = jnp.array([1.0, -0.5, 2.0, 0.7])[piece]
    return size * args * jnp.stack([y[1] + 0.3 * jnp.sin(t), -jnp.sin(y[0])])


def _controller(dtmax=None, tolerance=1e-4):
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, dtmax=dtmax)
    return diffrax.ClipStepSizeController(controller, jump_ts=_JUMPS)


def _solve(y0, args, solver, interval, adjoint, **options):
    options = dict(stepsize_controller=_controller(), max_steps=2048) | options
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_vector_field),
        solver,
        *interval,
        None,
        y0,
        args,
        adjoint=adjoint,
        **options,
    )


_Y0 = jnp.array([1.0, 0.5])


@pytest.mark.parametrize(
    "solver, interval",
    pairwise_or_product(
        _SOLVERS,
        (
            pytest.param((0.0, 1.7), id="forward"),
            pytest.param((1.7, 0.1), id="backward"),
        ),
    ),
)
def test_against_recursive_checkpoints(solver, interval):
    t0, t1 = interval
    ts = jnp.array([0.9, 0.45 if t0 > t1 else 1.0])
    saveat = diffrax.SaveAt(t1=True, ts=ts, steps=True)

    def loss(*x):
        ys = _solve(*x, solver, interval, loss.adjoint, saveat=saveat).ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0) ** 2)

    @jit
    def grads(y0, args):
        result = []
        for adjoint in (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint()):
            loss.adjoint = adjoint
            result.append(jax.grad(loss, (0, 1))(y0, args))
        return result

    grad, true_grad = grads(_Y0, jnp.array(1.3))
    assert tree_difference(grad, true_grad) < 1e-10


def test_order():
    """The order of a smooth problem, with three jumps on the way."""

    def end(solver, dtmax, tolerance):
        controller = _controller(dtmax, tolerance)
        adjoint = ReversibleAdjoint()
        options = dict(stepsize_controller=controller, max_steps=4096)
        solution = _solve(_Y0, 1.3, solver, (0.0, 1.7), adjoint, **options)
        return solution.ys[-1], solution.stats["num_accepted_steps"]

    end = jax.jit(end, static_argnums=0)
    true, _ = end(Reversible(diffrax.Dopri8()), 0.02, 1e-13)
    # With so large a tolerance `dtmax` alone determines the steps.
    results = [end(ReversibleALF4(), dtmax, 1e6) for dtmax in (0.06, 0.04, 0.03, 0.02)]
    steps = np.array([int(n) for _, n in results])
    errors = np.array([float(jnp.max(jnp.abs(y - true))) for y, _ in results])
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"order across three jumps: {order:.2f}, errors {errors}")
    assert abs(order - 4) < 0.15
    assert errors[0] < 1e-5


def test_replay():
    controller = RecordedSteps(_controller(), capacity=256)
    saveat = diffrax.SaveAt(t1=True, controller_state=True)
    args = (_Y0, 1.3, ReversibleALF4(), (0.0, 1.7), ReversibleAdjoint())
    first = _solve(*args, stepsize_controller=controller, saveat=saveat)
    record = first.controller_state.record
    assert int(jnp.sum(record.made_jump)) == 3
    second = _solve(*args, stepsize_controller=ReplayedSteps(record))
    assert tree_difference(second.ys, first.ys) < 1e-15


@pytest.mark.parametrize("solver", (ReversibleALF4(), diffrax.Tsit5()))
def test_jump_at_the_start_with_a_solver_state(solver):
    """What the solver has cached is that before the jump."""

    def loss(y0, v0, adjoint):
        cached = (jnp.array(False), v0) if isinstance(solver, diffrax.Tsit5) else v0
        options = dict(solver_state=cached, made_jump=True, dt0=0.05)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            solver,
            jnp.nextafter(_JUMPS[0], 1.0),
            0.8,
            y0=y0,
            args=1.3,
            adjoint=adjoint,
            **options,
        )
        return jnp.sum(solution.ys**2)

    v0 = _vector_field(0.45 - 1e-12, _Y0, 1.3)

    @jit
    def grads(y0, v0):
        adjoints = (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint())
        return [jax.value_and_grad(loss, (0, 1))(y0, v0, a) for a in adjoints]

    (value, grad), (true_value, true_grad) = grads(_Y0, v0)
    assert abs(value - true_value) < 1e-13
    assert tree_difference(grad, true_grad) < 1e-10
