"""How much of the solution has been lost in a reverse sweep: what it has reconstructed is
compared with what is known.

Rounding is amplified in the tangents of the reconstructed states, too, and faster. So the
derivatives of these functions are the same functions of the tangents.
"""

import functools as ft

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._autodiff.report import is_trusted, OnFailure
from ..._tree import real_dtype
from ..._types import IntScalarLike, RealScalarLike
from ..discrete.measures import norm, with_tangents


_MESSAGE = (
    "`adjoint=ReversibleAdjoint()` has lost {what} on its way back: at t = {t} the {one} "
    "that it found{element} differs from the one that it should have found by a relative "
    "{loss:.1e}, which is more than {rtol:.1e}, so that the {result} would be wrong. "
    "Undoing steps amplifies rounding where the flow contracts, and where the solver "
    "itself damps (`Reversible(coupling_parameter=...)`, `ALF(eta=...)`). Ways out: "
    "`solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`, which undoes nothing; "
    "`ReversibleAdjoint(checkpoints=...)`; float64."
)

_NO_ROOM = (
    "The solve{element} restarted {number} times, and "
    "`adjoint=ReversibleAdjoint(checkpoints={slots})` has room for {slots}. A reversible "
    "solver restarts where the flow contracts, and the state before each restart must be "
    "kept. Use `ReversibleAdjoint(checkpoints={number})`, or more; or "
    "`solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`."
)

_WRONG = (
    "The solution{element} is wrong, and not only its gradient: the two copies of it that "
    "the reversible solver carries have come to differ by {difference:.1e} times its "
    "size. The flow contracts, and so their difference grows. Ways out: a solver that "
    "restarts, for example `ReversibleALF4()` or `Reversible(diffrax.Tsit5())`, without "
    "`restart=None`; or `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`."
)

# Of the two copies of a solution, relative to its size.
_largest_difference = 0.3


def has_room_for(
    on_failure: OnFailure, number: Array, slots: int, matters: Array
) -> Array:
    """Whether there are slots for the states before all restarts. Raises or warns at run
    time if not."""

    def describe(element, number, slots):
        return _NO_ROOM.format(element=element, number=int(number), slots=int(slots))

    number = jnp.where(matters, number, 0).astype(jnp.float32)
    return is_trusted(number, slots, on_failure, describe)


def is_solution(
    on_failure: OnFailure, difference: Array, size: Array, matters: Array
) -> Array:
    """Whether the two copies of a solution, whose difference was at most `difference`,
    are close enough to be the solution. Raises or warns at run time if not."""

    def describe(element, difference, _):
        return _WRONG.format(element=element, difference=difference)

    size = jnp.asarray(size, difference.dtype)
    relative = difference / jnp.where(size == 0, 1, size)
    # A solve that has failed tells so itself.
    relative = jnp.where(matters & jnp.isfinite(relative), relative, 0)
    return is_trusted(relative, _largest_difference, on_failure, describe)


def default_rtol(y: PyTree[Array], num_steps: IntScalarLike) -> Array:
    """The loss at which a gradient still keeps two digits; a little more for every step,
    since each of them rounds, however sound the problem. Where undoing steps amplifies
    rounding, pulling them back amplifies the cotangent of the second copy as much: then
    the loss is `a * eps` and the error of the gradient `a * a * eps`. Measured on a
    pendulum with friction, contracting networks and van der Pol's oscillator, over
    intervals from harmless to hopeless."""
    eps = _eps(y)
    num_steps = jnp.asarray(num_steps, real_dtype(y))
    return jnp.minimum((0.01 * eps) ** 0.5 + 4 * eps * num_steps, 1e-2)


def noise(y: PyTree[Array], num_steps: IntScalarLike) -> Array:
    """What of the largest component of the solution may be seen in any other, since it
    is rounded."""
    num_steps = jnp.asarray(num_steps, real_dtype(y))
    return _eps(y) * jnp.maximum(2, 0.1 * jnp.sqrt(num_steps))


def _eps(y) -> float:
    return max((float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(y)), default=0.1)


@jax.custom_jvp
def relative_loss(
    found: PyTree[Array], known: PyTree[Array], sizes: PyTree[Array], noise: Array
) -> Array:
    """The largest difference of two states, of every component relative to its size in
    the course of the solve; or to that of the largest, if it is no larger than `noise`
    of that."""
    whole = norm(sizes)

    def one(found, known, size):
        difference = jnp.abs(found - known)
        largest = whole.astype(difference.dtype)
        size = size.astype(difference.dtype)
        own = size > noise.astype(size.dtype) * largest
        size = jnp.where(own, size, largest)
        return difference / jnp.where(difference == 0, 1, size)

    loss = norm(jtu.tree_map(one, found, known, sizes))
    # A solve that has failed tells so itself.
    return jnp.where(jnp.isfinite(norm(sizes)), loss, 0)


@relative_loss.defjvp
def _(primals, tangents):
    *_, noise = primals
    *tangents, _ = tangents
    return relative_loss(*primals), relative_loss(*tangents, noise)


@with_tangents
def of_both(y_loss: Array, solver_state_loss: Array) -> Array:
    """The loss of a state. What is lost of the second copy that a solver keeps in its
    state changes sign from stage to stage, so that a gradient sees little more than its
    square: 0.03 of it cost 1e-4 of a gradient, all of it 1e-2."""
    return jnp.maximum(y_loss, solver_state_loss.astype(y_loss.dtype) ** 2)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def doubt(
    on_failure: OnFailure, loss: Array, size: Array, rtol: Array, t: RealScalarLike
) -> Array:
    """Zero, or NaN where the sweep is not to be trusted: where `loss`, at `t`, is larger
    than `rtol`, and `size`, of the cotangents, is not zero. Raises or warns at run time,
    or leaves it at that."""
    loss = jnp.where(size == 0, 0, loss)
    return _check(on_failure, loss, rtol, t, "the solution", "state", "gradient")


@doubt.defjvp
def _(on_failure, primals, tangents):
    loss, size, rtol, t = primals
    tangent_loss, tangent_size, *_ = tangents
    matters = (size != 0) | (tangent_size != 0)
    # A second derivative loses more digits than the tangents do: measured as `rtol` is.
    worst = jnp.where(matters, jnp.maximum(loss, 10 * tangent_loss), 0)
    what = ("derivatives of the solution", "derivative", "second derivative")
    return doubt(on_failure, *primals), _check(on_failure, worst, rtol, t, *what)


def _check(on_failure, loss, rtol, t, what, one, result):
    def describe(element, loss, rtol, t):
        values = dict(t=t, element=element, loss=loss, rtol=rtol)
        return _MESSAGE.format(what=what, one=one, result=result, **values)

    okay = is_trusted(loss, rtol, on_failure, describe, t)
    return jnp.where(okay, 0, jnp.nan).astype(loss.dtype)
