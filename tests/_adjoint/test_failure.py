"""Solves that fail: they do as in diffrax, and no gradient is finite and wrong."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    RecordedSteps,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ..helpers import adjoint_of, jit, pairwise_or_product, tree_difference


_SOLVERS = (
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=pytest.mark.slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
)


def _smooth(t, y, rate):
    return jnp.sin(rate * y + t)


def _not_a_number(t, y, rate):
    """From some time on."""
    return jnp.where(t < 0.4, _smooth(t, y, rate), jnp.nan)


def _explosion(t, y, rate):
    """Infinite at `t = 1 / (rate * y0)`."""
    return rate * y**2


_pid = diffrax.PIDController(rtol=1e-4, atol=1e-4)
_failures = {
    "NaN at given steps": (
        _not_a_number,
        diffrax.ConstantStepSize(),
        32,
        diffrax.RESULTS.successful,
    ),
    "NaN at adaptive steps": (
        _not_a_number,
        _pid,
        32,
        diffrax.RESULTS.max_steps_reached,
    ),
    "max_steps at given steps": (
        _smooth,
        diffrax.ConstantStepSize(),
        5,
        diffrax.RESULTS.max_steps_reached,
    ),
    "max_steps at adaptive steps": (
        _explosion,
        _pid,
        32,
        diffrax.RESULTS.max_steps_reached,
    ),
    "dt_min": (
        _explosion,
        diffrax.PIDController(rtol=1e-4, atol=1e-4, dtmin=1e-3, force_dtmin=False),
        128,
        diffrax.RESULTS.dt_min_reached,
    ),
}
_FAILURES = tuple(pytest.param(*x, id=name) for name, x in _failures.items())


def _loss(y0, rate, solver, vector_field, controller, max_steps, adjoint, throw):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        0.0,
        2.0,
        0.1,
        y0,
        rate,
        saveat=diffrax.SaveAt(t1=True, ts=jnp.array([0.15, 1.7]), steps=2),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )
    # `inf` is what diffrax leaves where nothing was saved.
    ys = jnp.where(jnp.isinf(solution.ys), 0, solution.ys)
    return jnp.sum(jnp.sin(ys)), (solution.ys, solution.stats, solution.result)


@pytest.mark.parametrize(
    "solver, vector_field, controller, max_steps, result",
    pairwise_or_product(_SOLVERS, _FAILURES),
)
def test_without_throw(solver, vector_field, controller, max_steps, result):
    @jit
    def values_and_grads(y0, rate):
        f = jax.value_and_grad(_loss, (0, 1), has_aux=True)
        rest = (controller, max_steps)
        adjoints = (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint())
        return [
            f(y0, rate, solver, vector_field, *rest, adjoint, False)
            for adjoint in adjoints
        ]

    (ours, grad), (theirs, true_grad) = values_and_grads(
        jnp.array([0.9, 0.7]), jnp.array(1.3)
    )
    (_, (ys, stats, found)), (_, (true_ys, true_stats, true)) = ours, theirs
    assert found == true == result
    same = jtu.tree_map(lambda a, b: bool(a == b), stats, true_stats)
    assert all(jtu.tree_leaves(same))
    assert jnp.array_equal(ys, true_ys, equal_nan=True)
    if controller is _pid and vector_field is _not_a_number:
        # diffrax's own gradient is NaN, though all steps that were are rejected: see
        # below.
        assert all(jnp.all(jnp.isnan(x)) for x in true_grad)
        return
    for x, y in zip(grad, true_grad):
        # Close to an explosion rounding is amplified.
        assert jnp.all(jnp.isnan(x)) or tree_difference(x, y) < 1e-6


@pytest.mark.parametrize("solver", _SOLVERS)
def test_rejected_steps_do_not_matter(solver):
    """The gradient is that of the accepted steps, which are not NaN."""

    def end(y0, vector_field, controller, t1, dt0, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            0.0,
            t1,
            dt0,
            y0,
            1.3,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=32,
            throw=False,
        )
        return jnp.sum(solution.ys[-1] ** 2), solution.controller_state

    grad = eqx.filter_jit(jax.grad(end, has_aux=True))
    y0, controller = jnp.array([0.9, 0.7]), RecordedSteps(_pid, 32)
    found, state = grad(y0, _not_a_number, controller, 2.0, 0.1, adjoint_of(solver))
    count = int(state.record.count)
    assert 2 < count < 32
    nodes = jnp.append(state.record.t0s[:count], state.record.t1s[count - 1])
    controller = diffrax.StepTo(nodes)
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    true, _ = grad(y0, _smooth, controller, nodes[-1], None, adjoint)
    assert tree_difference(found, true) < 1e-10


@pytest.mark.parametrize("solver", _SOLVERS)
def test_throw(solver):
    vector_field, controller, max_steps, _ = _failures["max_steps at adaptive steps"]

    @eqx.filter_jit
    def grad(y0):
        rest = (solver, vector_field, controller, max_steps, adjoint_of(solver), True)
        return jax.grad(_loss, has_aux=True)(y0, 1.3, *rest)[0]

    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jax.block_until_ready(grad(jnp.array([0.9, 0.7])))


@pytest.mark.parametrize(
    "ours", (ReversibleAdjoint(checkpoints=2), SymplecticAdjoint())
)
def test_one_of_a_batch(ours):
    """The others have their gradients."""
    solver = (
        diffrax.Tsit5() if isinstance(ours, SymplecticAdjoint) else ReversibleALF4()
    )
    y0 = jnp.array([[0.2, 0.1], [0.9, 0.7], [0.0, 0.3]])

    @jit
    def grads(y0, rate):
        rest = (rate, solver, _explosion, _pid, 64)

        def total(y0, adjoint):
            f = lambda y: _loss(y, *rest, adjoint, False)[0]
            return jnp.sum(jax.vmap(f)(y0))

        one = lambda y: _loss(y, *rest, diffrax.RecursiveCheckpointAdjoint(), False)[0]
        return jax.grad(total)(y0, ours), jax.lax.map(jax.grad(one), y0)

    found, true = grads(y0, jnp.array(1.3))
    for i in (0, 2):
        assert tree_difference(found[i], true[i]) < 1e-9
    assert jnp.all(jnp.isnan(found[1])) or tree_difference(found[1], true[1]) < 1e-9
