"""Interpolation, quadrature, and what the decay of the coefficients tells."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible._adjoint.interpolated.chebyshev import (
    chebyshev_points,
    gauss_legendre,
    lagrange,
)
from diffrax_reversible._adjoint.interpolated.resolution import missing, resolve, sizes
from diffrax_reversible._tree import combine


def _interpolate(f, n, x):
    return combine(lagrange(x, n), f(jnp.asarray(chebyshev_points(n))))


@pytest.mark.parametrize("n", (2, 5, 16))
def test_polynomials_are_reproduced(n):
    """And their derivatives, also at the points, where the barycentric formula is 0 / 0."""
    coefficients = np.random.default_rng(0).normal(size=n)
    f = lambda x: jnp.polyval(jnp.asarray(coefficients / 2.0 ** np.arange(n)), x)
    x = jnp.concatenate([jnp.asarray(chebyshev_points(n)), jnp.linspace(-1, 1, 9)])
    found = ft.partial(_interpolate, f, n)
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(found)(x), jax.vmap(f)(x), atol=1e-9)
        found, f = jax.jacfwd(found), jax.jacfwd(f)


def test_interpolation_of_a_pytree():
    values = {"a": jnp.arange(12.0).reshape(4, 3), "b": (jnp.ones((4, 0)), jnp.ones(4))}
    weights = lagrange(jnp.array(0.3), 4)
    found = combine(weights, values)
    np.testing.assert_allclose(found["a"], weights @ values["a"])
    assert found["b"][0].shape == (0,)
    np.testing.assert_allclose(found["b"][1], 1)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.complex64, jnp.complex128))
def test_dtype(dtype):
    weights = lagrange(jnp.array(0.3, jnp.finfo(dtype).dtype), 5)
    assert combine(weights, jnp.ones(5, dtype)).dtype == dtype


def test_convergence_is_spectral():
    """Poles at a distance of 0.5: every node gains a factor of 0.5 + sqrt(1.25)."""
    f = lambda x: 1 / (1 + 4 * x**2)
    x = jnp.linspace(-1, 1, 201)
    numbers = np.arange(5, 42, 12)
    interpolant = lambda n: jax.vmap(lambda x: _interpolate(f, n, x))(x)
    errors = [float(jnp.max(jnp.abs(interpolant(n) - f(x)))) for n in numbers.tolist()]
    slope, _ = np.polyfit(numbers, np.log(errors), 1)
    assert slope == pytest.approx(-np.log(0.5 + 1.25**0.5), rel=0.05)


@pytest.mark.parametrize("n", (2, 7))
def test_gauss_legendre(n):
    points, weights = gauss_legendre(n)
    assert np.all(np.diff(points) < 0)
    for degree in range(2 * n):
        true = (1 - (-1) ** (degree + 1)) / (degree + 1)
        assert np.sum(weights * points**degree) == pytest.approx(true, abs=1e-14)


def _resolve(f, n, rtol=1e-6):
    points = chebyshev_points(n)
    values = f(jnp.asarray(points))
    loss, needed = resolve(values, points, sizes(values), rtol)
    return float(loss), float(needed)


_functions = (
    pytest.param(lambda x: 1 / (1 + 25 * x**2), 41, id="poles, even"),
    pytest.param(lambda x: x / (1 + 9 * x**2), 21, id="poles, odd"),
    pytest.param(lambda x: jnp.sin(20 * x + 0.3), 29, id="oscillation"),
    pytest.param(lambda x: jnp.exp(-30 * (x + 1)), 19, id="layer"),
)


@pytest.mark.parametrize("f, n", _functions)
def test_what_is_not_resolved(f, n):
    """The number of points that is proposed does, and a third of it does not."""
    rtol = 1e-6
    loss, needed = _resolve(f, n, rtol)
    assert loss > rtol
    assert n < needed < 4 * n
    x = jnp.linspace(-1, 1, 301)

    def error(n):
        found = jax.vmap(lambda x: _interpolate(f, n, x))(x)
        return jnp.max(jnp.abs(found - f(x))) / jnp.max(jnp.abs(f(x)))

    assert _resolve(f, int(needed) + 1, rtol)[0] < rtol
    assert error(int(needed) + 1) < 10 * rtol
    assert error(int(needed / 3)) > rtol


@pytest.mark.parametrize("n", (8, 64))
def test_what_is_smooth_is_resolved(n):
    """To rounding; also what is zero, or nothing but rounding of other components."""
    noise = 1e-16 * jnp.asarray(np.random.default_rng(0).normal(size=n))
    points = chebyshev_points(n)
    values = {
        "a": jnp.stack([jnp.exp(0.1 * jnp.asarray(points)), noise], 1),
        "b": noise,
        "c": jnp.zeros((n, 2)),
    }
    assert resolve(values, points, sizes(values), 1e-3)[0] < 1e-3
    assert resolve({}, points, {}, 1e-3)[0] == 0
    assert resolve(values["c"], points, sizes(values["c"]), 1e-3)[0] == 0


def test_components_have_scales_of_their_own():
    """What is lost of a small one is not hidden by a large one beside it."""
    points = chebyshev_points(8)
    small = jnp.cos(20 * jnp.asarray(points))
    values = jnp.stack([jnp.full(8, 1e5), small], 1)
    assert resolve(values, points, sizes(values), 1e-3)[0] > 0.1
    reached, seen = jnp.array([1e5, 1.0]), jnp.array([1e5, 0.1])
    assert missing(reached, seen, reached, 1e-3)[0] == pytest.approx(0.9)
    rounding = jnp.array([1e5, 1e-11])
    assert missing(rounding, 0 * rounding + 1e5, rounding, 1e-3)[0] == 0


def test_kinks_have_no_number():
    """Noise does not decay, so that no number of points is proposed."""
    noise = jnp.asarray(np.random.default_rng(1).normal(size=32))
    loss, needed = resolve(noise, chebyshev_points(32), sizes(noise), 1e-6)
    assert loss > 0.01
    assert needed > 4 * 32
