"""What a failed step adds to a gradient, and its derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest
from diffrax import RESULTS

from diffrax_reversible._reversal.base import ReverseStep
from diffrax_reversible._reversal.diagonal_runge_kutta import LinearSystems
from diffrax_reversible._reversal.failure import distrusted, or_nan


@pytest.mark.parametrize("failed", (False, True))
@pytest.mark.parametrize("size", (0.0, 2.0))
@pytest.mark.parametrize("tangent_size", (0.0, 2.0))
def test_distrusted(failed, size, tangent_size):
    x = jnp.array([1.0 + 2.0j, jnp.inf if failed else 3.0])
    f = lambda x, size: distrusted(x, size, jnp.array(failed))
    primals, tangents = (
        (x, jnp.array(size)),
        (jnp.ones_like(x), jnp.array(tangent_size)),
    )
    found, tangent = jax.jit(lambda *x: jax.jvp(f, *x))(primals, tangents)
    if not failed:
        assert jnp.all(found == x) and jnp.all(tangent == 1)
    else:
        assert jnp.all(jnp.isnan(found) if size else found == 0)
        assert jnp.all(jnp.isnan(tangent) if size or tangent_size else tangent == 0)


@pytest.mark.parametrize("wrap", (jax.jit, lambda f: f), ids=("jit", "eager"))
def test_or_nan(wrap):
    def f(x, failed):
        failure = RESULTS.nonlinear_max_steps_reached
        return or_nan(RESULTS.where(failed, failure, RESULTS.successful), x)

    one = jnp.array(1.0)
    both = lambda failed: jax.jvp(lambda x: f(x, failed), (one,), (one,))
    found = lambda failed: wrap(both)(jnp.array(failed))
    assert jnp.all(jnp.isnan(jnp.stack(found(True)))) and found(False) == (1, 1)
    assert or_nan(RESULTS.successful, "anything") == "anything"


def test_singular_system():
    step = ReverseStep(lambda p: p, (), 0.0, False, False, 1, True)
    systems = LinearSystems(lx.LU(), frozenset())

    def solve(matrix):
        operator = lx.MatrixLinearOperator(matrix)
        return systems.solve(step, operator, jnp.ones(2), jnp.array(1.0))

    assert jnp.all(solve(jnp.eye(2)) == 1)
    singular = jnp.ones((2, 2))
    assert jnp.all(jnp.isnan(solve(singular)))
    # The tangent is the solution of another system, which lineax raises for.
    with pytest.raises(eqx.EquinoxRuntimeError):
        jax.jvp(solve, (singular,), (jnp.eye(2),))
