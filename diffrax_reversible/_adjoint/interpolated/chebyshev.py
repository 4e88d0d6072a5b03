"""Polynomials through values at given points of `[-1, 1]`, and quadrature.

Chebyshev points are those of the second kind, ends included, in increasing order.
"""

import functools as ft

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._types import FloatScalarLike


@ft.cache
def chebyshev_points(n: int) -> np.ndarray:
    # By the sine they are symmetric to the last bit.
    return np.sin(np.pi * np.arange(1 - n, n, 2) / (2 * (n - 1)))


@ft.cache
def _weights(n: int) -> np.ndarray:
    """The barycentric weights of the Chebyshev points."""
    weights = (-1.0) ** np.arange(n)
    weights[[0, -1]] /= 2
    return weights


@ft.cache
def _differentiation(n: int) -> np.ndarray:
    """The matrix that takes values at the Chebyshev points to those of the derivative."""
    points, weights = chebyshev_points(n), _weights(n)
    difference = points[:, None] - points[None, :] + np.eye(n)
    matrix = weights[None, :] / weights[:, None] / difference * (1 - np.eye(n))
    return matrix - np.diag(np.sum(matrix, 1))


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def lagrange(x: FloatScalarLike, n: int) -> Float[Array, " n"]:
    """The Lagrange polynomials of the Chebyshev points at `x`, by the barycentric
    formula."""
    x = jnp.asarray(x)
    difference = x - jnp.asarray(chebyshev_points(n), x.dtype)
    hit = difference == 0
    terms = jnp.asarray(_weights(n), x.dtype) / jnp.where(hit, 1, difference)
    return jnp.where(jnp.any(hit), hit.astype(x.dtype), terms / jnp.sum(terms))


@lagrange.defjvp
def _lagrange_jvp(n, primals, tangents):
    # The derivative of the formula is lost where `x` is a point.
    value = lagrange(*primals, n)
    matrix = jnp.asarray(_differentiation(n), value.dtype)
    derivative = jnp.matmul(value, matrix, precision=lax.Precision.HIGHEST)
    return value, derivative * tangents[0]


@ft.cache
def refinement(n: int) -> np.ndarray:
    """The matrix that takes values at the Chebyshev points to those at eight times as
    many points."""
    fine = chebyshev_points(8 * n)
    inverse = to_coefficients(tuple(chebyshev_points(n).tolist()))
    return np.polynomial.chebyshev.chebvander(fine, n - 1) @ inverse


@ft.cache
def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points, in decreasing order, and weights."""
    points, weights = np.polynomial.legendre.leggauss(n)
    return points[::-1], weights[::-1]


@ft.cache
def to_coefficients(points: tuple[float, ...]) -> np.ndarray:
    """The matrix that takes values at `points` to the coefficients of the Chebyshev
    polynomials in the polynomial through them."""
    return np.linalg.inv(np.polynomial.chebyshev.chebvander(points, len(points) - 1))
