"""Telling, while it runs, that a gradient is not to be trusted."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from equinox import branched_error_if
from jaxtyping import Array, Bool, PyTree

from .._call_site import CallSite
from .._compat import unvmap_any
from .._types import BoolScalarLike, RealScalarLike


Action: TypeAlias = Literal["raise", "nan", "warn"]


class OnFailure(NamedTuple):
    """What to do about a gradient that is not to be trusted.

    - `call_site`: of what is differentiated.
    """

    action: Action
    call_site: CallSite | None


def check_action(name: str, action: str) -> None:
    """Raises `ValueError` unless `name(on_failure=action)` is known."""
    if action not in ("raise", "nan", "warn"):
        raise ValueError(
            f'`{name}(on_failure=...)` must be "raise", "nan" or "warn"; got {action!r}.'
        )


class _Messages(Sequence[str]):
    """The one message of an error that is found out when it is raised: equinox looks for
    it at run time."""

    def __init__(self, text: str, call_site: CallSite | None):
        self.text = text
        self._call_site = call_site

    def __len__(self):
        return 1

    def __getitem__(self, index):
        del index
        if self._call_site is None:
            return self.text
        return f"{self.text}\n\nIt is about this solve:\n{self._call_site}"


def error_if(
    x: PyTree, pred: BoolScalarLike, message: str, call_site: CallSite | None
) -> PyTree:
    """`equinox.error_if`, that also shows the line of the solve. Where a gradient is
    traced, the stack does not."""
    return branched_error_if(x, pred, 0, _Messages(message, call_site))


def is_trusted(
    loss: Array,
    rtol: RealScalarLike,
    on_failure: OnFailure,
    describe: Callable[..., str],
    *values: Any,
) -> Bool[Array, ""]:
    """Whether `loss` is at most `rtol`. If it is not, raises or warns at run time, with
    the message `describe(element, loss, rtol, *values)`, in which `element` names the
    one of a batch whose loss is largest; or leaves it at that."""
    action, call_site = on_failure
    loss, rtol, values = lax.stop_gradient((loss, rtol, values))
    rtol = jnp.asarray(rtol, loss.dtype)
    failed = ~(loss <= rtol)
    if action == "nan":
        return ~failed
    messages = _Messages("", call_site)

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
            messages.text = message
            if action == "warn":
                _warn(message, call_site)
        return np.zeros(loss.shape, np.int32)

    def call():
        struct = jax.ShapeDtypeStruct((), jnp.int32)
        args = (loss, rtol, *values)
        return jax.pure_callback(report, struct, *args, vmap_method="expand_dims")

    index = lax.cond(unvmap_any(failed), call, lambda: jnp.array(0, jnp.int32))
    if action == "warn":
        return index == 0
    # What equinox may put in the place of `failed`, instead of raising, is `True`.
    return ~branched_error_if(failed, failed, index, messages)


def _warn(message: str, call_site: CallSite | None) -> None:
    if call_site is None:
        warnings.warn(message, stacklevel=2)
    else:
        warnings.warn_explicit(message, UserWarning, call_site.file, call_site.line)
