"""The axes over which a primitive is vmapped."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class VmappedAxis:
    """The axis of one `jax.vmap`; `mapped` says which inputs carry it."""

    mapped: tuple[bool, ...]
    size: int
    name: Hashable
    spmd_name: Any

    @property
    def in_axes(self) -> list[int | None]:
        return [0 if carried else None for carried in self.mapped]


def vmapped(fn, axes: Sequence[VmappedAxis], in_axes: Callable, out_axes: Callable):
    """`fn`, vmapped over `axes`, the innermost first."""
    for axis in axes:
        fn = jax.vmap(
            fn,
            in_axes=in_axes(axis),
            out_axes=out_axes(axis),
            axis_name=axis.name,
            axis_size=axis.size,
            spmd_axis_name=axis.spmd_name,
        )
    return fn


def sizes(axes: Sequence[VmappedAxis]) -> tuple[int, ...]:
    """The shape that `axes` put in front of what carries all of them."""
    return tuple(axis.size for axis in reversed(axes))


def new_axis(axis_data, mapped: Sequence[bool]) -> VmappedAxis:
    if axis_data.explicit_mesh_axis is not None:
        raise NotImplementedError(
            "`jax.vmap` of `diffeqsolve(...)` over an axis of the mesh that is of "
            "`AxisType.Explicit` is not supported. Make it of `AxisType.Auto` with "
            "`jax.make_mesh(..., axis_types=...)`, or use `jax.shard_map`."
        )
    # An unnamed axis has a plain object for a name; ours must not clash with any other.
    name = axis_data.name if is_named(axis_data) else object()
    return VmappedAxis(tuple(mapped), axis_data.size, name, axis_data.spmd_name)


def is_named(axis) -> bool:
    """Whether the axis has a name by which something inside could refer to it."""
    return type(axis.name) is not object


def with_axis(axis_data, carried: bool, x, dim: int | None):
    """`x` with its axis in front, where it is to carry one."""
    if x is None or not carried:
        return x
    if dim is None:
        return jnp.broadcast_to(x, (axis_data.size, *jnp.shape(x)))
    return jnp.moveaxis(x, dim, 0)
