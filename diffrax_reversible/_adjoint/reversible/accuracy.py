"""No silent loss of accuracy: what the reverse sweep finds is compared with what is
known."""

import functools as ft
from typing import TypeAlias

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ..._autodiff.report import Action, is_trusted
from ..._types import IntScalarLike, RealScalarLike


OnInaccurate: TypeAlias = Action

_MESSAGE = (
    "`adjoint=ReversibleAdjoint()` has lost the solution on its way back: at t = {t} "
    "the state that it found{element} differs from the one that it should have found by a "
    "relative {loss:.1e}, which is more than {rtol:.1e}, so that the gradient would be "
    "wrong. Undoing the steps of a contracting flow amplifies rounding. Ways out: "
    "`ReversibleAdjoint(checkpoints=...)`, float64, smaller steps, a shorter interval, "
    "or `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)


def default_rtol(y: PyTree[Array], num_steps: IntScalarLike) -> Array:
    """The loss at which a gradient still keeps two digits; a little more for every step,
    since each of them rounds, however sound the problem. Measured on a pendulum with
    friction, a contracting network and van der Pol's oscillator, over intervals from
    harmless to hopeless."""
    leaves = jtu.tree_leaves(y)
    eps = max((float(jnp.finfo(x.dtype).eps) for x in leaves), default=0.1)
    return jnp.minimum(eps**0.5 + 4 * eps * num_steps, 1e-2)


def _norm(y: PyTree[Array]) -> Array:
    leaves = [jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(y)]
    return ft.reduce(jnp.maximum, leaves)


def reversal_loss(found: PyTree, known: PyTree, final: PyTree) -> Array:
    """The difference of two states, relative to the size of the solution."""
    found, known, final = lax.stop_gradient((found, known, final))
    scale = jnp.maximum(_norm(known), _norm(final))
    difference = _norm(jtu.tree_map(jnp.subtract, found, known))
    loss = difference / jnp.where(scale == 0, 1, scale)
    # A solve that has failed tells so itself.
    return jnp.where(jnp.isfinite(_norm(final)), loss, 0)


def check(
    loss: Array,
    t: RealScalarLike,
    rtol: RealScalarLike,
    on_inaccurate: OnInaccurate,
) -> Bool[Array, ""]:
    """Whether the gradient is to be trusted. Raises or warns at run time if it is not,
    or leaves it at that."""

    def describe(element, loss, rtol, t):
        return _MESSAGE.format(t=t, element=element, loss=loss, rtol=rtol)

    return is_trusted(loss, rtol, on_inaccurate, describe, t)
