"""Telling how close a gradient is to what is not accepted."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class ReversalReport(eqx.Module):
    """How well `ReversibleAdjoint` has undone a solve, for
    `ReversibleAdjoint(monitor=...)`. Its fields are NumPy arrays of the shape of the batch:
    the axes of every `jax.vmap` that the gradient is part of, and `()` without one.

    - `loss`: the largest relative difference between the states that were found on the
        way back and those that should have been found; `inf` if nothing of the solution
        was left.
    - `rtol`: the largest one that is accepted.
    - `t`: where `loss` was found.
    - `num_restarts`: of the solver; 0 for one that does not restart.
    - `checkpoints`: how many states there is room for, those before restarts among them;
        0 if none are kept.
    - `num_steps`: how many steps were undone.

    ```python
    reports = []
    adjoint = ReversibleAdjoint(monitor=reports.append)
    jax.grad(loss)(parameters, adjoint)
    print(reports[-1].loss / reports[-1].rtol)  # below 1
    ```
    """

    loss: Float[np.ndarray, "..."]
    rtol: Float[np.ndarray, "..."]
    t: Float[np.ndarray, "..."]
    num_restarts: Int[np.ndarray, "..."]
    checkpoints: Int[np.ndarray, "..."]
    num_steps: Int[np.ndarray, "..."]


Monitor: TypeAlias = Callable[[ReversalReport], object]


def watch(monitor: Monitor | None, x: Array, **values) -> Array:
    """`x`; hands a `ReversalReport` of these values to `monitor` when it is run."""
    if monitor is None:
        return x
    values = lax.stop_gradient(jax.tree.map(jnp.asarray, values))

    def report(values):
        arrays = np.broadcast_arrays(*map(np.asarray, values.values()))
        # Broadcast arrays are not to be written to.
        monitor(ReversalReport(**dict(zip(values, map(np.array, arrays)))))
        return np.zeros(arrays[0].shape, np.int32)

    # In one call for a whole batch, which a `jax.debug.callback` is not. What it returns
    # is no float64, which it cannot be under `with jax.enable_x64(True)`: that is a
    # matter of one thread, and this is called in another.
    struct = jax.ShapeDtypeStruct((), np.int32)
    zero = jax.pure_callback(report, struct, values, vmap_method="expand_dims")
    return x + zero.astype(x.dtype)
