"""NaN in place of what a step that has failed would add to a gradient."""

import jax
import jax.numpy as jnp
from diffrax import is_okay, RESULTS
from jaxtyping import Array, PyTree

from .._tree import scale, where
from .._types import BoolScalarLike, RealScalarLike


@jax.custom_jvp
def doubt_of_masked(size: Array, y_size: RealScalarLike) -> Array:
    """Zero. Under forward mode NaN, where `y_size` is not finite, and was of no account
    since there were no cotangents, but there are tangents of these.

    - `size`: of the cotangents.
    """
    del y_size
    # Not a constant, which `jax.vmap` would give another shape than its tangent.
    return jnp.where(size == 0, jnp.zeros_like(size), 0)


@doubt_of_masked.defjvp
def _(primals, tangents):
    (size, y_size), (tangent_size, _) = primals, tangents
    wrong = ~jnp.isfinite(y_size) & (size == 0) & (tangent_size != 0)
    return doubt_of_masked(*primals), jnp.where(wrong, jnp.nan, 0).astype(size.dtype)


def doubt_of_failed(size: Array, failed: BoolScalarLike) -> Array:
    """Zero, or NaN if something has `failed`, unless there are no cotangents, nor tangents
    of these, so that nothing depends on it."""
    # Not a product with zero.
    nan = jnp.where(failed, jnp.nan, 0).astype(size.dtype)
    return doubt_of_masked(size, nan) + jnp.where(size == 0, 0, nan)


def distrusted(x: PyTree, size: Array, failed: BoolScalarLike) -> PyTree:
    """`x`, and if it has `failed` what `doubt_of_failed` is, in values and tangents."""
    found = where(jnp.logical_not(failed), x, 0)
    return scale(1 + doubt_of_failed(size, failed), found)


def has_failed(result: RESULTS) -> BoolScalarLike:
    """Whether a step has failed; `False` itself where it cannot."""
    if result.is_traced():
        return jnp.logical_not(is_okay(result))
    with jax.ensure_compile_time_eval():
        return not bool(is_okay(result))


def or_nan(result: RESULTS, x: PyTree) -> PyTree:
    """`x`, and NaN if the step has failed, in values and tangents."""
    failed = has_failed(result)
    # Whatever it is of: `x` need not be made of numbers where nothing can fail.
    return x if failed is False else scale(jnp.where(failed, jnp.nan, 1), x)
