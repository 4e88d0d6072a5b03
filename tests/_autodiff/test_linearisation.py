"""What is kept of a function for its derivative."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible._autodiff.linearisation import Linearisation


def _layers(x, weights):
    for w in weights:
        x = jnp.tanh(w @ x)
    return x


def _activations(x, weights):
    """Functions that are traced as calls."""
    first, second = weights
    return jax.nn.gelu(second @ jax.nn.silu(first @ jnp.where(x > 0, x, 0.1 * x)))


def _sums(x, weights):
    """Here what the residual is computed from would be more numbers than itself."""
    first, _ = weights
    x, y, z = jnp.split(first @ x, 3)
    return jnp.sum(jnp.sin(jnp.cumsum(x) + jnp.cumsum(y) + jnp.cumsum(z)))


def _printing(x, weights):
    """What has an effect is not done twice."""
    first, _ = weights
    x = first @ x
    jax.debug.callback(lambda: _seen.append(1))
    return jnp.sin(x)


_seen = []


@pytest.mark.parametrize(
    "fn, numbers",
    # The inputs, and the matrix products.
    (
        (_layers, 4 + 12 + 5),
        (_activations, 4 + 12 + 5),
        (_sums, 4 + 4),
        (_printing, 16),
    ),
)
def test_derivative_and_numbers(fn, numbers):
    weights = [jr.normal(jr.PRNGKey(0), (12, 4)), jr.normal(jr.PRNGKey(1), (5, 12))]
    x, tangent = jr.normal(jr.PRNGKey(2), (2, 4))
    wiggle = [0.1 * w for w in weights]
    linearisation = Linearisation.trace(fn, x, weights, (True, [True, True]))
    assert linearisation is not None
    _seen.clear()
    out, residuals = linearisation.evaluate(x, weights)
    shared = linearisation.shared(x, weights)
    found = linearisation.tangent(residuals, shared, [tangent, *wiggle])
    jax.effects_barrier()
    assert len(_seen) == (1 if fn is _printing else 0)
    true_out, true = jax.jvp(fn, (x, weights), (tangent, wiggle))
    assert jnp.max(jnp.abs(out - true_out)) < 1e-14
    assert jnp.max(jnp.abs(found - true)) < 1e-14
    size = sum(r.size for r in residuals)
    assert size == numbers
    # The weights themselves.
    assert {w.shape for w in shared} <= {(12, 4), (5, 12), ()}
