"""Arithmetic of pytrees."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from ._compat import ω
from ._types import BoolScalarLike


def zeros_of(fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Zeros like what `fn(*args)` returns, without evaluating it."""
    struct = eqx.filter_eval_shape(fn, *args)
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)


def where(pred: BoolScalarLike, x: PyTree, y: PyTree) -> PyTree:
    """`jnp.where` of pytrees; `y` may be a number. `x` if `pred` is `True` itself."""
    if pred is True:
        return x
    if isinstance(y, int):
        return jtu.tree_map(lambda a: jnp.where(pred, a, y), x)
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


def real_dtype(y: PyTree) -> Any:
    """The widest real dtype in a pytree, and at least float32."""
    dtypes = [jnp.finfo(jnp.result_type(x)).dtype for x in jtu.tree_leaves(y)]
    return max((jnp.float32, *dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def norm(y: PyTree) -> Array:
    """The size of the largest component."""
    zero = jnp.zeros((), real_dtype(y))
    leaves = [jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(y)]
    return ft.reduce(jnp.maximum, [x.astype(zero.dtype) for x in leaves], zero)


def add(*trees: PyTree) -> PyTree:
    """The sum; `None` counts as zero."""
    trees = tuple(x for x in trees if x is not None)
    if len(trees) == 0:
        return None
    total, *rest = trees
    for x in rest:
        total = (total**ω + x**ω).ω
    return total


def scale(factor: ArrayLike, x: PyTree) -> PyTree:
    """`factor * x` with a real factor, in the dtype of `x`."""

    def one(x):
        # A complex number times a real one is no promotion.
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(factor, jnp.finfo(jnp.result_type(x)).dtype) * x

    return jtu.tree_map(one, x)


def outer(weights: ArrayLike, x: PyTree) -> PyTree:
    """`x` times each of the weights, along a leading axis."""
    product = lambda x: jnp.tensordot(
        jnp.asarray(weights, jnp.result_type(x)), x, axes=0
    )
    return jtu.tree_map(product, x)


def combine(weights: ArrayLike, xs: PyTree) -> PyTree:
    """The weighted sum over the leading axis of `xs`."""

    def one(xs):
        w = jnp.asarray(weights, xs.dtype)
        return jnp.tensordot(w, xs, axes=1, precision=lax.Precision.HIGHEST)

    return jtu.tree_map(one, xs)
