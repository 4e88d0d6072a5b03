"""Vector fields of lower precision than the state, and complex states."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import Reversible, ReversibleALF4

from ..helpers import adjoint_of, jit, leaf_differences, pairwise_or_product


_slow = pytest.mark.slow
_SOLVERS = (
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=_slow),
    pytest.param(diffrax.ReversibleHeun(), id="Heun", marks=_slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5", marks=_slow),
)
# Of the state, of what the vector field computes in, and of what it returns; and how
# different gradients may be.
_DTYPES = (
    pytest.param((jnp.float32, jnp.bfloat16, jnp.float32), 1e-6, id="bfloat16"),
    pytest.param(
        (jnp.float32, jnp.float16, jnp.float16), 1e-6, id="float16", marks=_slow
    ),
    pytest.param((jnp.complex128,) * 3, 1e-12, id="complex128"),
    pytest.param((jnp.complex64,) * 3, 1e-5, id="complex64", marks=_slow),
    # One unit in the last place of these is 8e-3 and 1e-3.
    pytest.param((jnp.bfloat16,) * 3, 2e-2, id="bfloat16 state"),
    pytest.param((jnp.float16,) * 3, 5e-3, id="float16 state", marks=_slow),
)


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax:UserWarning")
@pytest.mark.parametrize(
    "solver, dtypes, tolerance", pairwise_or_product(_SOLVERS, _DTYPES)
)
def test_against_recursive_checkpoints(solver, dtypes, tolerance):
    state, inner, outer = dtypes

    def vector_field(t, y, weights):
        y = jnp.tanh(weights.astype(inner) @ y.astype(inner))
        return (y * jnp.cos(t).astype(inner)).astype(outer)

    def loss(y0, weights, adjoint):
        real = jnp.finfo(state).dtype
        t0, t1, dt0, *ts = jnp.array([0.0, 1.0, 0.125, 0.33, 1.0], real)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            t0,
            t1,
            dt0,
            y0,
            weights,
            saveat=diffrax.SaveAt(ts=jnp.stack(ts)),
            adjoint=adjoint,
            max_steps=16,
        )
        assert solution.ys.dtype == state
        return jnp.sum(jnp.abs(solution.ys).astype(jnp.float64) ** 2)

    y0 = jnp.array([0.5, 1.0, -0.3])
    weights = jr.normal(jr.PRNGKey(0), (3, 3))
    if jnp.issubdtype(state, jnp.complexfloating):
        y0, weights = y0 * (1 + 0.3j), weights + 0.2j * weights[::-1]
    weights = weights.astype(jnp.float32 if outer != state else state)

    @jit
    def grads(y0, weights):
        adjoints = (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(loss, (0, 1))(y0, weights, adjoint) for adjoint in adjoints]

    found, true = grads(y0.astype(state), weights)
    assert leaf_differences(found, true) < tolerance
