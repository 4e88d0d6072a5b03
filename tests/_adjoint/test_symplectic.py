import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import SymplecticAdjoint

from ..helpers import (
    CONTROLLERS,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    pairwise_or_product,
    parameters,
    SAVES,
    tree_difference,
)


_SOLVERS = (
    pytest.param(diffrax.Heun(), id="Heun"),
    pytest.param(diffrax.Bosh3(), id="Bosh3"),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
    pytest.param(diffrax.Dopri8(), id="Dopri8"),
    pytest.param(diffrax.Dopri5(), id="Dopri5", marks=pytest.mark.slow),
    pytest.param(diffrax.Ralston(), id="Ralston", marks=pytest.mark.slow),
)


_ADJOINTS = (
    pytest.param(SymplecticAdjoint(), id="plain"),
    pytest.param(SymplecticAdjoint(store_stages=True), id="stages"),
    pytest.param(SymplecticAdjoint(checkpoints=3), id="checkpoints"),
    pytest.param(SymplecticAdjoint(checkpoints=2, store_stages=True), id="both"),
)


def _check(solver, stepping, saves, interval, ours):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(loss)(p, solver, stepping, saves, interval, adjoint)
            for adjoint in (ours, diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(parameters())
    assert abs(value - true_value) < 1e-13 * abs(true_value)
    assert tree_difference(grad, true_grad) < 1e-12
    assert leaf_differences(grad, true_grad) < 1e-12
    matters = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(true_grad)]
    assert sum(matters) >= len(matters) - 1


@pytest.mark.parametrize(
    "solver, stepping, saves, interval, ours",
    pairwise_or_product(_SOLVERS, CONTROLLERS, SAVES, INTERVALS, _ADJOINTS),
)
def test_against_recursive_checkpoints(solver, stepping, saves, interval, ours):
    _check(solver, stepping, saves, interval, ours)


@pytest.mark.parametrize(
    "stepping, saves, interval, ours",
    pairwise_or_product(CONTROLLERS[:2], SAVES, INTERVALS, _ADJOINTS),
)
def test_euler(stepping, saves, interval, ours):
    _check(diffrax.Euler(), stepping, saves, interval, ours)
