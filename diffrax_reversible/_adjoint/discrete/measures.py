"""Sizes of states and cotangents.

Under forward mode each of these functions is joined by the same function of the tangents,
in the place of a derivative.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def with_tangents(fn: Callable) -> Callable:
    """`fn`, of which the tangent is `fn` of the tangents."""
    fn = jax.custom_jvp(fn)

    @fn.defjvp
    def _(primals, tangents):
        return fn(*primals), fn(*tangents)

    return fn


def real_dtype(y: PyTree[Array]) -> Any:
    """The widest real dtype in a pytree, and at least float32."""
    dtypes = [jnp.finfo(x.dtype).dtype for x in jtu.tree_leaves(y)]
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


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


@with_tangents
def norm(y: PyTree[Array]) -> Array:
    """The size of the largest component."""
    zero = jnp.zeros((), real_dtype(y))
    leaves = [jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(y)]
    return ft.reduce(jnp.maximum, [x.astype(zero.dtype) for x in leaves], zero)
