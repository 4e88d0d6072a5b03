"""Zeros in the shape of something that is not known yet."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def zeros_of(fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Zeros like what `fn(*args)` returns, without evaluating it."""
    struct = eqx.filter_eval_shape(fn, *args)
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
