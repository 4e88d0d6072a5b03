"""Sizes of states and cotangents.

Under forward mode each of these functions is joined by the same function of the tangents,
in the place of a derivative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ... import _tree as tree


def with_tangents(fn: Callable) -> Callable:
    """`fn`, of which the tangent is `fn` of the tangents."""
    fn = jax.custom_jvp(fn)

    @fn.defjvp
    def _(primals, tangents):
        return fn(*primals), fn(*tangents)

    return fn


@with_tangents
def sizes(y: PyTree[Array]) -> PyTree[Array]:
    """The absolute value of every component, in half as many digits."""

    def one(x):
        dtype = jnp.float32 if jnp.finfo(x.dtype).bits > 32 else jnp.bfloat16
        largest = jnp.asarray(jnp.finfo(dtype).max, jnp.finfo(x.dtype).dtype)
        return jnp.minimum(jnp.abs(x), largest).astype(dtype)

    return jtu.tree_map(one, y)


@with_tangents
def largest(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """The larger one of each pair of sizes."""
    return jtu.tree_map(jnp.maximum, x, y)


norm = with_tangents(tree.norm)
