import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible._solver.updates.repeat import repeat

from ...helpers import tree_difference


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
        return y, jnp.sum(y), dict(y=y)

    def plain(carry, factor):
        y, total = carry
        y, out, contribution = body(y, factor)
        return (y, jax.tree.map(jnp.add, total, contribution)), out

    f = lambda y: repeat(body, y, _factors, reverse)
    (scan,) = [eqn for eqn in jax.make_jaxpr(f)(y).eqns if eqn.primitive.name == "scan"]
    assert scan.params["unroll"] == unroll
    zeros = dict(y=jnp.zeros_like(y))
    (end, total), outs = lax.scan(plain, (y, zeros), _factors, reverse=reverse)
    assert tree_difference(f(y), (end, outs, total)) < 1e-12


def test_one_turn():
    """What is not an array is the same in every turn."""
    body = lambda y, x: (y + x["x"], y * x["x"], None if x["kind"] == "b" else y)
    xs = dict(x=jnp.array([3.0]), kind="a")
    y, products, total = repeat(body, jnp.array(2.0), xs)
    assert y == 5 and products.tolist() == [6] and total == 2
    assert repeat(body, jnp.array(2.0), xs | dict(kind="b"))[2] is None
