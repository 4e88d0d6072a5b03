"""Increments rounded to a grid, with which a step is undone bit for bit."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..updates.update import AbstractUpdate


def propose_grid(bound: float, dtype=None) -> float:
    """See `AbstractALFComposition.propose_grid`."""
    if not 0 < bound < math.inf:
        raise ValueError(f"`propose_grid({bound!r})` needs a positive bound.")
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"`propose_grid({bound!r}, {dtype.name})` needs the dtype of the solution, "
            "which is a floating-point one, for example `jnp.float32`."
        )
    return 2.0 ** _power(bound, dtype)


def _power(bound: float, dtype) -> int:
    return 1 + math.ceil(math.log2(bound)) - _digits(dtype)


def check_grid(name: str, grid: float) -> None:
    if not 0 < grid < math.inf or math.frexp(grid)[0] != 0.5:
        raise ValueError(
            f"`{name}(grid={grid!r})` must be a power of two, so that its multiples "
            "are exact in floating point. `propose_grid(bound, dtype)` proposes one: "
            "where neither the solution nor the vector field is larger than 8, "
            f"`grid=2.0**{_power(8.0, jnp.float32)}` in float32, and "
            f"`grid=2.0**{_power(8.0, jnp.float64)}` in float64."
        )


def snap(x: PyTree, grid: float | None) -> PyTree:
    """Rounds to the nearest multiples of `grid`; the derivative is that of the
    identity."""
    return x if grid is None else jtu.tree_map(lambda a: _snap(a, grid), x)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _snap(x, grid):
    return jnp.round(x / grid) * grid


@_snap.defjvp
def _(grid, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _snap(x, grid), tangent


def check_range(z: PyTree, v: PyTree, grid: float | None) -> PyTree:
    """`z`; raises, when it is run, where `z` or `v` is so large that the multiples of
    `grid` are not exact any more."""
    if grid is None:
        return z
    large = [
        jnp.any(_size(a) > grid * 2.0 ** _digits(a.dtype)) for a in _leaves((z, v))
    ]
    return eqx.error_if(
        z,
        ft.reduce(jnp.logical_or, large, jnp.array(False)),
        f"With `grid={grid!r}` the solution or the vector field has become so large "
        "that multiples of the grid are no longer exact in its dtype, and a step could "
        "not be undone bit for bit. Use a coarser grid: `propose_grid(bound, dtype)` "
        "proposes one for a bound on both.",
    )


def _leaves(x):
    return map(jnp.asarray, jtu.tree_leaves(x))


def _digits(dtype) -> int:
    return jnp.finfo(dtype).nmant + 1


def _size(x):
    if jnp.iscomplexobj(x):
        return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    return jnp.abs(x)


class OnGrid(AbstractUpdate):
    """Puts the initial state on the grid. It changes nothing later on, and it is not
    undone: the reverse of the first step leads to the rounded initial state."""

    grid: float = eqx.field(static=True)

    def read(self, state):
        return None

    def evaluate(self, terms, args, point):
        return None

    def write(self, state, k):
        return snap(state, self.grid), None

    def unwrite(self, state, k):
        return state
