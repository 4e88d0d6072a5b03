"""Telling, while it runs, that a gradient is not to be trusted."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._compat import unvmap_any
from .._types import RealScalarLike


Action: TypeAlias = Literal["raise", "nan", "warn"]


def check_action(name: str, action: str) -> None:
    """Raises `ValueError` unless `name(on_failure=action)` is known."""
    if action not in ("raise", "nan", "warn"):
        raise ValueError(
            f'`{name}(on_failure=...)` must be "raise", "nan" or "warn"; got {action!r}.'
        )


def is_trusted(
    loss: Array,
    rtol: RealScalarLike,
    action: Action,
    describe: Callable[..., str],
    *values: Any,
) -> Bool[Array, ""]:
    """Whether `loss` is at most `rtol`. If it is not, raises or warns at run time, with
    the message `describe(element, loss, rtol, *values)`, in which `element` names the
    one of a batch whose loss is largest; or leaves it at that."""
    loss, rtol, values = lax.stop_gradient((loss, rtol, values))
    rtol = jnp.asarray(rtol, loss.dtype)
    failed = ~(loss <= rtol)
    if action == "nan":
        return ~failed

    def report(loss, rtol, *values):
        loss = np.asarray(loss)
        failed = ~(loss <= rtol)
        if np.any(failed):
            index = np.unravel_index(np.argmax(np.where(failed, loss, -1)), loss.shape)
            element = f" for element {tuple(map(int, index))} of the batch"
            at = lambda x: np.broadcast_to(np.asarray(x), loss.shape)[index]
            message = describe(
                element if index else "", *(at(x) for x in (loss, rtol, *values))
            )
            if action == "raise":
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        return np.zeros(loss.shape, bool)

    def call():
        struct = jax.ShapeDtypeStruct((), bool)
        args = (loss, rtol, *values)
        return jax.pure_callback(report, struct, *args, vmap_method="expand_dims")

    return ~lax.cond(unvmap_any(failed), call, lambda: jnp.array(False))
