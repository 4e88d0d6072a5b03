import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4

from ..helpers import (
    CONTROLLERS,
    directional_difference,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    normal_like,
    pairwise_or_product,
    parameters,
    save_everything,
    SAVES,
    SOLVERS,
    step_to,
    tree_difference,
)


@pytest.mark.parametrize(
    "solver, stepping, saves, interval",
    pairwise_or_product(SOLVERS, CONTROLLERS, SAVES, INTERVALS),
)
def test_against_recursive_checkpoints(solver, stepping, saves, interval):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(loss)(p, solver, stepping, saves, interval, adjoint)
            for adjoint in (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(parameters())
    assert abs(value - true_value) < 1e-12 * abs(true_value)
    assert tree_difference(grad, true_grad) < 1e-10
    # Every parameter by itself, so that no small one is drowned.
    assert leaf_differences(grad, true_grad) < 1e-10
    matters = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(true_grad)]
    assert sum(matters) >= len(matters) - 1


def test_against_finite_differences():
    interval, stepping, saves = (0.3, 1.9), step_to, save_everything
    direction = normal_like(parameters(), 7)

    def f(p):
        return loss(p, ReversibleALF4(), stepping, saves, interval, ReversibleAdjoint())

    p = parameters()
    grad = jit(jax.grad(f))(p)
    found = sum(
        jnp.vdot(g, d)
        for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(direction))
    )
    true = directional_difference(jit(f), p, direction, 1e-3)
    assert abs(found - true) < 1e-8 * abs(true)
