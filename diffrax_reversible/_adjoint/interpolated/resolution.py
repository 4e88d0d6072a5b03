"""No silent loss of accuracy: whether a function is resolved by the points at which it
is known, from the decay of its Chebyshev coefficients."""

import functools as ft
import math
from typing import TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ..._autodiff.report import Action, is_trusted
from ..._types import BoolScalarLike, RealScalarLike
from .chebyshev import to_coefficients


OnUnresolved: TypeAlias = Action

_MESSAGE = (
    "`adjoint=InterpolatedAdjoint(nodes={nodes})` does not resolve {what} between "
    "t = {start} and t = {end}{element}: a relative error of about {loss:.1e} is more "
    "than {rtol:.1e}, so that the gradient would be wrong. {way_out} Or use "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)
_SOLUTION = (
    "the solution",
    "About `InterpolatedAdjoint(nodes={count})` would do, if the solution is smooth; where "
    "the vector field jumps, `ClipStepSizeController(jump_ts=...)`.",
    "Its Chebyshev coefficients do not decay, or miss what the steps of the solve have "
    "seen, so that at least `InterpolatedAdjoint(nodes={count})` are needed; or, where "
    "more nodes are no better, "
    "smaller tolerances of the solve, `InterpolatedAdjoint(..., landing=True)`, or "
    "`ClipStepSizeController(jump_ts=...)` where the vector field jumps.",
)
_ADJOINT = (
    "the solution of the adjoint equation",
    "About `InterpolatedAdjoint(..., quadrature={count})` would do, or "
    "`quadrature=False`.",
    "Its Chebyshev coefficients do not decay, so that at least "
    "`InterpolatedAdjoint(..., quadrature={count})` points are needed, or "
    "`quadrature=False`.",
)


class Resolution(eqx.Module):
    """The worst that was found, and where.

    - `loss`: the estimated error, relative to the size of the function.
    - `needed`: the number of points for which it would be `rtol`, infinite if unknown.
    """

    loss: Array
    needed: Array
    start: RealScalarLike
    end: RealScalarLike
    adjoint: BoolScalarLike


def sizes(tree: PyTree[Array]) -> PyTree[Array]:
    """The largest absolute value in each leaf."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), tree)


def largest(sizes: PyTree[Array]) -> Array:
    return ft.reduce(jnp.maximum, jtu.tree_leaves(sizes), jnp.zeros((), jnp.float32))


def _scales(sizes: PyTree[Array]) -> list[Array]:
    """What the error of each leaf is relative to: its size, unless it is nothing but
    rounding of the others."""
    size = largest(sizes)
    floor = jnp.finfo(size.dtype).eps ** 0.5 * jnp.where(size == 0, 1, size)
    return [jnp.maximum(x, floor.astype(x.dtype)) for x in jtu.tree_leaves(sizes)]


def resolve(
    values: PyTree[Array],
    points: np.ndarray,
    sizes: PyTree[Array],
    rtol: float,
) -> tuple[Array, Array]:
    """`loss` and `needed` of a function with these values at these points."""
    n = len(points)
    if len(jtu.tree_leaves(values)) == 0:
        return jnp.zeros(()), jnp.zeros(())
    matrix = to_coefficients(tuple(points.tolist()))
    values, sizes = lax.stop_gradient((values, sizes))

    def magnitudes(x, scale):
        x = x.reshape(n, -1)
        found = jnp.matmul(matrix.astype(x.dtype), x, precision=lax.Precision.HIGHEST)
        return jnp.max(jnp.abs(found), 1, initial=0) / scale

    found = list(map(magnitudes, jtu.tree_leaves(values), _scales(sizes)))
    envelope = lax.cummax(ft.reduce(jnp.maximum, found), reverse=True)
    # An eighth of them, since some may be small by chance, or for symmetry.
    last = n - max(2, n // 8)
    first = last // 2
    log = jnp.log(jnp.maximum(envelope, jnp.finfo(envelope.dtype).tiny))
    rate = (log[first] - log[last]) / (last - first)
    missing = (log[last] - math.log(rtol / 2)) / jnp.where(rate > 0, rate, 1)
    needed = jnp.where(rate > 0, 8 / 7 * (last + missing) + 3, jnp.inf)
    # What is not finite speaks for itself.
    loss = jnp.where(jnp.isfinite(envelope[0]), envelope[last], 0)
    return loss, needed


def missing(
    reached: PyTree[Array], seen: PyTree[Array], sizes: PyTree[Array]
) -> tuple[Array, Array]:
    """The same, of a function that goes as far as `reached` where it was not looked at,
    and as far as `seen` where it was. Of interest where the two are very different."""
    if len(jtu.tree_leaves(seen)) == 0:
        return jnp.zeros(()), jnp.zeros(())
    reached, seen, sizes = lax.stop_gradient((reached, seen, sizes))
    missed = jtu.tree_map(lambda a, b: jnp.max(a - b, initial=0), reached, seen)
    scaled = [x / scale for x, scale in zip(jtu.tree_leaves(missed), _scales(sizes))]
    loss = ft.reduce(jnp.maximum, scaled)
    known = jnp.isfinite(loss) & (loss > 0.05)
    return jnp.where(known, loss, 0), jnp.full_like(loss, jnp.inf)


def worse(a: Resolution, b: Resolution) -> Resolution:
    pick = lambda x, y: jnp.where(b.loss > a.loss, y, x)
    return jtu.tree_map(pick, a, b)


def _way_out(needed, count, adjoint):
    _, known, unknown = _ADJOINT if adjoint else _SOLUTION
    if needed <= 4 * count:
        return known.format(count=math.ceil(needed))
    return unknown.format(count=2 * count)


def check(
    found: Resolution,
    nodes: int,
    quadrature: int,
    rtol: float,
    on_unresolved: OnUnresolved,
) -> Bool[Array, ""]:
    """Whether the gradient is to be trusted. Raises or warns at run time if it is not,
    or leaves it at that."""

    def describe(element, loss, rtol, needed, start, end, adjoint):
        return _MESSAGE.format(
            nodes=nodes,
            what=(_ADJOINT if adjoint else _SOLUTION)[0],
            start=start,
            end=end,
            element=element,
            loss=loss,
            rtol=rtol,
            way_out=_way_out(needed, quadrature if adjoint else nodes, adjoint),
        )

    values = (found.needed, found.start, found.end, found.adjoint)
    return is_trusted(found.loss, rtol, on_unresolved, describe, *values)
