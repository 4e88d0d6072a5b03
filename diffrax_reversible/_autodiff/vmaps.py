"""The axes over which a function with a reverse sweep is vmapped."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Level:
    """One `jax.vmap`."""

    mapped: tuple[bool, ...]
    size: int
    name: Hashable
    spmd_name: Any


def vmapped(fn, levels: Sequence[Level], in_axes: Callable, out_axes: Callable):
    for level in levels:
        fn = jax.vmap(
            fn,
            in_axes=in_axes(level),
            out_axes=out_axes(level),
            axis_name=level.name,
            axis_size=level.size,
            spmd_axis_name=level.spmd_name,
        )
    return fn


def axes(flags: Sequence[bool]) -> tuple[int | None, ...]:
    return tuple(0 if flag else None for flag in flags)


def new_level(axis_data, mapped: Sequence[bool]) -> Level:
    if axis_data.explicit_mesh_axis is not None:
        raise NotImplementedError(
            "`jax.vmap` of `diffeqsolve(...)` over an axis of the mesh that is of "
            "`AxisType.Explicit` is not supported. Make it of `AxisType.Auto` with "
            "`jax.make_mesh(..., axis_types=...)`, or use `jax.shard_map`."
        )
    # An unnamed axis has a plain object for a name; ours must not clash with any other.
    name = axis_data.name if type(axis_data.name) is not object else object()
    return Level(tuple(mapped), axis_data.size, name, axis_data.spmd_name)


def unmapped(axis_data, dims) -> bool:
    """Whether a `jax.vmap` is none of our business: no operand carries its axis, and it
    has no name by which something inside could refer to it."""
    return type(axis_data.name) is object and all(dim is None for dim in dims)


def to_front(x, dim):
    return x if dim is None else jnp.moveaxis(x, dim, 0)
