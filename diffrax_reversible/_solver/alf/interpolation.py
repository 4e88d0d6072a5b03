"""Dense output of the compositions of asynchronous-leapfrog steps."""

import jax
import jax.numpy as jnp
from diffrax import AbstractLocalInterpolation
from jaxtyping import PyTree

from ..._compat import ω
from ..._types import RealScalarLike, Y


class StageInterpolation(AbstractLocalInterpolation):
    r"""A polynomial through both ends of a step, made of the stage values $f_i$,

    $u(\theta) = z_0 + \theta (z_1 - z_0)
        + \theta (1 - \theta) \sum_j (2 \theta - 1)^j c_j, \quad
    c_j = h \sum_i P_{ji} f_i.$

    It does not look at $v$, whose drift away from the vector field spoils the cubic
    Hermite interpolant. Continuous; its derivative jumps at the ends by no more than
    the error of the polynomial.
    """

    t0: RealScalarLike  # pyright: ignore
    t1: RealScalarLike  # pyright: ignore
    y0: Y
    y1: Y
    coefficients: tuple[Y, ...]

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree:
        del left
        if t1 is not None:
            return (self.evaluate(t1) ** ω - self.evaluate(t0) ** ω).ω
        still = self.t0 == self.t1
        theta = jnp.where(still, 0, t0 - self.t0) / jnp.where(
            still, 1, self.t1 - self.t0
        )
        with jax.numpy_dtype_promotion("standard"):
            total = self.coefficients[-1]
            for c in reversed(self.coefficients[:-1]):
                total = (c**ω + (2 * theta - 1) * total**ω).ω
            line = self.y0**ω + theta * (self.y1**ω - self.y0**ω)
            return (line + theta * (1 - theta) * total**ω).ω
