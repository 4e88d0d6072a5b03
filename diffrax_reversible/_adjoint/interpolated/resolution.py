"""The estimated error of an interpolation, from the decay of its Chebyshev coefficients,
so that no accuracy is lost in silence."""

import functools as ft
import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ..._autodiff.report import is_trusted, OnFailure
from ..._types import BoolScalarLike, RealScalarLike
from ..discrete.measures import norm
from .chebyshev import to_coefficients


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
    "more nodes are no better, smaller tolerances of the solve, or "
    "`ClipStepSizeController(jump_ts=...)` where the vector field jumps.",
)
_ADJOINT = (
    "the solution of the adjoint equation",
    "About `InterpolatedAdjoint(..., quadrature={count})` would do, or "
    "`quadrature=None`.",
    "Its Chebyshev coefficients do not decay, so that at least "
    "`InterpolatedAdjoint(..., quadrature={count})` points are needed, or "
    "`quadrature=None`.",
)


class Resolution(eqx.Module):
    """The worst error that was found, and where.

    - `loss`: the estimated error of a component, relative to its size.
    - `needed`: the number of points for which it would be `rtol`, infinite if unknown.
    - `adjoint`: whether it is that of the adjoint, not of the solution.
    """

    loss: Array
    needed: Array
    start: RealScalarLike
    end: RealScalarLike
    adjoint: BoolScalarLike


def sizes(values: PyTree[Array]) -> PyTree[Array]:
    """The largest absolute value of each component along the leading axis."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), 0, initial=0), values)


def _relative(errors: PyTree[Array], sizes: PyTree[Array], rtol: float) -> list[Array]:
    """Errors of each component relative to its size; to more where it is nothing but
    rounding of the others, which then is less than `rtol`."""
    eps = lambda x: x * jnp.finfo(x.dtype).eps
    noise = 8 / rtol * norm(jtu.tree_map(eps, sizes))
    floor = jnp.where(noise > 0, noise, 1)

    def one(error, size):
        scale = jnp.maximum(size, floor.astype(size.dtype))
        return error / jnp.broadcast_to(scale, error.shape)

    return list(map(one, jtu.tree_leaves(errors), jtu.tree_leaves(sizes)))


def resolve(
    values: PyTree[Array],
    points: np.ndarray,
    sizes: PyTree[Array],
    rtol: float,
) -> tuple[Array, Array]:
    """`loss` and `needed` of a function with these values at these points.

    - `sizes`: of its components.
    """
    n = len(points)
    matrix = to_coefficients(tuple(points.tolist()))
    values, sizes = lax.stop_gradient((values, sizes))

    def magnitudes(x):
        coefficients = jnp.tensordot(
            matrix.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST
        )
        return jnp.abs(coefficients)

    found = _relative(jtu.tree_map(magnitudes, values), sizes, rtol)
    dtype = norm(sizes).dtype
    found = [jnp.max(x.reshape(n, -1), 1, initial=0).astype(dtype) for x in found]
    worst = ft.reduce(jnp.maximum, found, jnp.zeros(n, dtype))
    envelope = lax.cummax(worst, reverse=True)
    # An eighth of them, since some may be small by chance, or for symmetry.
    last = n - max(2, n // 8)
    first = last // 2
    log = jnp.log(jnp.maximum(envelope, jnp.finfo(dtype).tiny))
    rate = (log[first] - log[last]) / (last - first)
    more = (log[last] - math.log(rtol / 2)) / jnp.where(rate > 0, rate, 1)
    needed = jnp.where(rate > 0, 8 / 7 * (last + more) + 3, jnp.inf)
    # What is not finite speaks for itself.
    loss = jnp.where(jnp.isfinite(envelope[0]), envelope[last], 0)
    return loss, needed


def missing(
    reached: PyTree[Array], seen: PyTree[Array], sizes: PyTree[Array], rtol: float
) -> tuple[Array, Array]:
    """`loss` and `needed` of a function of which a component goes as far as `reached`
    where it was not looked at, and as far as `seen` where it was. Of interest where the
    two are very different."""
    reached, seen, sizes = lax.stop_gradient((reached, seen, sizes))
    missed = jtu.tree_map(lambda a, b: jnp.maximum(a - b, 0), reached, seen)
    loss = norm(_relative(missed, sizes, rtol))
    known = jnp.isfinite(loss) & (loss > 0.05)
    return jnp.where(known, loss, 0), jnp.full_like(loss, jnp.inf)


def worse(a: Resolution, b: Resolution) -> Resolution:
    pick = lambda x, y: jnp.where(b.loss > a.loss, y, x)
    return jtu.tree_map(pick, a, b)


def is_resolved(
    found: Resolution, nodes: int, quadrature: int, rtol: float, on_failure: OnFailure
) -> Bool[Array, ""]:
    """Whether the gradient is to be trusted. Raises or warns at run time if it is not,
    or leaves it at that."""

    def describe(element, loss, rtol, needed, start, end, adjoint):
        what, known, unknown = _ADJOINT if adjoint else _SOLUTION
        count = quadrature if adjoint else nodes
        if needed <= 4 * count:
            way_out = known.format(count=math.ceil(needed))
        else:
            way_out = unknown.format(count=2 * count)
        return _MESSAGE.format(
            nodes=nodes,
            what=what,
            start=start,
            end=end,
            element=element,
            loss=loss,
            rtol=rtol,
            way_out=way_out,
        )

    values = (found.needed, found.start, found.end, found.adjoint)
    return is_trusted(found.loss, rtol, on_failure, describe, *values)
