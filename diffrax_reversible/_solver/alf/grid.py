"""Increments rounded to a grid, with which a step is undone bit for bit."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..updates.update import AbstractShift, State


def propose_grid(bound: float, dtype=None) -> float:
    r"""The finest grid for `ReversibleALF4(grid=...)` and its relatives on which the
    state can be twice as large as `bound`.

    **Arguments:**

    - `bound`: of the absolute value of every component of the solution and of the
        vector field, at the stages of the steps as well.
    - `dtype`: of the state. Defaults to JAX's default floating-point dtype.

    **Returns:**

    The power of two $q$ with $2 \cdot \text{bound} \leq q\, 2^p$, in which $p$ is the
    number of digits of the dtype: 24 for float32, 53 for float64. So the grid is about
    as fine as the rounding at the bound itself.

    **Raises:** `ValueError` if `bound` is not a positive number.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"`propose_grid({bound!r})` needs a positive bound.")
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    return 2.0 ** (1 + math.ceil(math.log2(bound)) - _digits(dtype))


def check_grid(name: str, grid: float) -> None:
    if not 0 < grid < math.inf or math.frexp(grid)[0] != 0.5:
        raise ValueError(
            f"`{name}(grid={grid!r})` must be a power of two, so that its multiples "
            "are exact in floating point, for example `grid=2.0**-40`. "
            "`propose_grid(bound, dtype)` proposes one."
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


def check_range(x: PyTree, grid: float | None) -> PyTree:
    """Raises, when it is run, where the multiples of `grid` are not exact any more."""
    if grid is None:
        return x
    large = [jnp.any(_size(a) > grid * 2.0 ** _digits(a.dtype)) for a in _leaves(x)]
    return eqx.error_if(
        x,
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


class OnGrid(AbstractShift):
    """Puts the initial state on the grid. It changes nothing later on, and it is not
    undone: the reverse of the first step leads to the rounded initial state."""

    grid: float = eqx.field(static=True)

    def write(self, terms, state, substep):
        del terms, substep
        y, solver_state = snap((state.y, state.solver_state), self.grid)
        return State(y, solver_state, state.sums)

    def unwrite(self, terms, state, substep):
        del terms, substep
        return state
