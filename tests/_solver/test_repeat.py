import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible._solver.updates.repeat import repeat

from ..helpers import tree_difference


_factors = jnp.linspace(0.5, 1.5, 6)


def _sin(y):
    return jnp.sin(y)


def _loop(y):
    return lax.fori_loop(0, jnp.argmax(y), lambda _, y: jnp.sin(y), y)


def _matrix(y):
    return jnp.tanh(jnp.ones((y.size, y.size)) @ y)


def _convolution(y):
    image = y.reshape(1, 1, 10, -1)
    kernel = jnp.ones((1, 1, 5, 5))
    return lax.conv(image, kernel, (1, 1), "SAME").reshape(-1)


@pytest.mark.parametrize(
    "field, size, unroll",
    (
        (_sin, 10, 6),
        (_sin, 20_000, 1),
        (jax.jit(_sin), 20_000, 1),
        (_matrix, 10, 6),
        (_matrix, 200, 1),
        (_convolution, 100, 6),
        (_convolution, 1000, 1),
        (_loop, 10, 1),
        (lambda y: lax.scan(lambda y, _: (jnp.sin(y), None), y, length=5)[0], 10, 6),
        (lambda y: lax.scan(lambda y, _: (jnp.sin(y), None), y, length=5)[0], 5000, 1),
    ),
)
@pytest.mark.parametrize("reverse", (False, True))
def test_repeat(field, size, unroll, reverse):
    """Small fields are unrolled; large ones, and those of unknown size, are not."""
    y = jr.normal(jr.PRNGKey(0), (size,))

    def body(y, factor):
        y = factor * field(y)
        return y, jnp.sum(y)

    f = lambda y: repeat(body, y, _factors, reverse)
    (scan,) = [eqn for eqn in jax.make_jaxpr(f)(y).eqns if eqn.primitive.name == "scan"]
    assert scan.params["unroll"] == unroll
    expected = lax.scan(body, y, _factors, reverse=reverse)
    assert tree_difference(f(y), expected) < 1e-12


def test_one_turn():
    y, sums = repeat(lambda y, x: (y + x, y * x), jnp.array(2.0), jnp.array([3.0]))
    assert y == 5 and sums.tolist() == [6]
