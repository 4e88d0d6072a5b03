"""The initial value problems that are timed."""

import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from ..measure import mlp


class Problem(NamedTuple):
    """A vector field with its parameters and initial state.

    - `field(t, y, params)` takes a state with or without a leading batch axis.
    - `make()` gives `y0` and `params`; nothing is computed before it is called.
    - `batched`: whether `y0` has a batch axis, so that it can be vmapped over.
    - `repeats`: evaluations in the loop that times one evaluation. It must run for much
        longer than a call of a compiled function takes.
    """

    name: str
    field: Callable
    make: Callable
    t1: float
    batched: bool
    repeats: int


@ft.cache
def arrays(problem):
    """`y0` and the parameters."""
    return problem.make()


@ft.cache
def shapes(problem):
    """Shapes and dtypes of `y0` and the parameters."""
    return jax.eval_shape(problem.make)


def num_bytes(tree):
    leaves = jtu.tree_leaves(tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


@ft.cache
def residual_bytes(problem):
    """What a derivative of one evaluation has to remember, the parameters apart."""
    y0, params = shapes(problem)
    field = lambda y, p: problem.field(jnp.zeros((), y.dtype), y, p)
    vjp = jax.eval_shape(lambda y, p: jax.vjp(field, y, p)[1], y0, params)
    return max(num_bytes(vjp) - num_bytes(params), num_bytes(y0))


#
# Networks
#


def _network(sizes, batch, dtype):
    def make():
        biases = [jnp.zeros(size, dtype) for size in sizes[1:]]
        shape = (sizes[0],) if batch is None else (batch, sizes[0])
        y0 = jr.normal(jr.PRNGKey(1), shape, dtype)
        return y0, (mlp(sizes, dtype), biases)

    return make


def _dense(y, weight, bias):
    y = y @ weight.T
    return y + jnp.broadcast_to(bias, y.shape)


def _mlp(t, y, params):
    del t
    weights, biases = params
    for weight, bias in zip(weights[:-1], biases[:-1]):
        y = jnp.tanh(_dense(y, weight, bias))
    return _dense(y, weights[-1], biases[-1])


def _tanh_layer(t, y, params):
    del t
    (weight,), (bias,) = params
    return jnp.tanh(_dense(y, weight, bias))


_mlp_sizes, _mlp_batch = (64, 128, 128, 64), 256


def mlp_problem(dtype=jnp.float32, sizes=_mlp_sizes, batch=_mlp_batch):
    """Two hidden layers, with other sizes, too."""
    return Problem("mlp", _mlp, _network(sizes, batch, dtype), 1.0, True, 100)


# A usual neural ODE: one evaluation takes a good part of a millisecond on a CPU.
MLP = mlp_problem()
# One large matrix product; the parameters outweigh the state.
WIDE = Problem(
    "wide", _tanh_layer, _network((1000, 1000), 100, jnp.float32), 1.0, True, 20
)
# Next to nothing to compute, so that the loop around it is what is timed.
SMALL = Problem(
    "small", _mlp, _network((2, 10, 10, 2), None, jnp.float64), 5.0, False, 10_000
)


#
# Images
#

_channels, _width = 8, 8


def _make_images():
    keys = jr.split(jr.PRNGKey(2), 3)
    y0 = jr.normal(keys[0], (16, _channels, _width, _width), jnp.float32)
    scale = (9 * _channels) ** -0.5
    kernel = lambda key: scale * jr.normal(key, (_channels, _channels, 3, 3), y0.dtype)
    return y0, [kernel(key) for key in keys[1:]]


def _convolutions(t, y, kernels):
    del t
    shape = y.shape
    y = y.reshape(-1, *shape[-3:])
    first, second = kernels
    y = jax.lax.conv(y, first, (1, 1), "SAME")
    y = jax.lax.conv(jnp.tanh(y), second, (1, 1), "SAME")
    return y.reshape(shape)


# Two layers of 3 x 3 kernels on 16 images of 8 x 8 points and 8 channels.
CONVOLUTION = Problem("convolution", _convolutions, _make_images, 1.0, True, 100)


#
# A partial differential equation
#

_points = 1024


def _make_wave():
    x = jnp.arange(_points) / _points
    # The coefficients that would be learnt: of advection, steepening and viscosity.
    coefficients = jnp.array([1.0, 0.5, 6e-5])
    return jnp.sin(2 * jnp.pi * x), coefficients


def _burgers(t, u, coefficients):
    del t
    speed, steepening, viscosity = coefficients
    right, left = jnp.roll(u, -1), jnp.roll(u, 1)
    slope = (right - left) * (_points / 2)
    curvature = (right - 2 * u + left) * _points**2
    return viscosity * curvature - (speed + steepening * u) * slope


# Viscous Burgers' equation on a circle, central differences, float64. A hundred steps
# have a Courant number of 0.3, and viscosity damps the shortest wave by e^5: explicit
# methods are stable, and what is damped can be found again.
BURGERS = Problem("burgers", _burgers, _make_wave, 0.02, False, 2_000)

PROBLEMS = (MLP, WIDE, SMALL, CONVOLUTION, BURGERS)
