"""Whether the cotangents of a function can be known before the point is."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree

from .._compat import depends


def cotangents_depend(
    fn: Callable[[PyTree, PyTree], PyTree],
    point: PyTree,
    parameters: PyTree,
    cotangent: PyTree,
) -> bool:
    """Whether the cotangents that `fn(point, parameters)` has for the cotangent of its
    value depend on `point`. If not, any `point` of the same shape gives them: `fn` is
    affine in it, and its derivative in the parameters the same everywhere."""

    def cotangents(point):
        _, vjp = jax.vjp(fn, point, parameters)
        return vjp(cotangent)

    return depends(cotangents, point)
