"""Sums over a batch that lies on several devices.

A parameter that the elements of a batch share has one cotangent, their sum, and the
devices would have to agree on it in every step of the sweep. So a vmapped axis of which
`spmd_axis_name` says that it is spread over the mesh becomes two, one over the devices
and one over the elements that each has. Over the first, each device has a copy of the
parameter, and a cotangent of its own; these are added up at the end.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .vmaps import is_named, VmappedAxis


def _mesh_shape(operands) -> dict:
    """The sizes of the axes of the mesh on which the operands lie, if on any."""
    for x in operands:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.empty:
            return dict(mesh.shape)
    return {}


def _num_devices(axis: VmappedAxis, mesh_shape: dict) -> int:
    spmd_name = axis.spmd_name
    names = spmd_name if isinstance(spmd_name, tuple) else (spmd_name,)
    number = math.prod(mesh_shape.get(name, 1) for name in names)
    # An axis by whose name the vector field communicates has to stay whole.
    whole = is_named(axis) or axis.size % number != 0
    return 1 if whole else number


class Devices:
    """How the operands of a function that is vmapped over `axes` lie on devices.

    - `shared`: which inputs are to get a copy on each.
    - `axes`: those after `spread`.
    """

    def __init__(self, axes: Sequence[VmappedAxis], shared: Sequence[int], operands):
        mesh_shape = _mesh_shape(operands)
        self._given = axes
        self._numbers = [_num_devices(axis, mesh_shape) for axis in axes]
        self._shared = shared
        self.axes = tuple(self._split_axes())

    def _split_axes(self):
        for axis, number in zip(self._given, self._numbers):
            if number == 1:
                yield axis
                continue
            mapped = [m or i in self._shared for i, m in enumerate(axis.mapped)]
            yield dataclasses.replace(
                axis, size=axis.size // number, name=object(), spmd_name=None
            )
            yield dataclasses.replace(
                axis, size=number, name=object(), mapped=tuple(mapped)
            )

    def _positions(self, i: int | None):
        """For each axis of which several devices have a share: how many, whether input `i`
        (`None`: an output) carries it, and where in the array it is or would be."""
        position = 0
        for axis, number in zip(reversed(self._given), reversed(self._numbers)):
            carried = i is None or axis.mapped[i]
            if number > 1 and (carried or i in self._shared):
                yield number, carried, position
            position += carried

    def spread(self, x, i: int | None = None):
        """Input `i`, or an output, as a function that is vmapped over `axes` wants it."""
        for number, carried, k in reversed(list(self._positions(i))):
            before, after = x.shape[:k], x.shape[k:]
            if carried:
                shape = (number, after[0] // number, *after[1:])
                x = x.reshape(before + shape)
            else:
                x = jnp.expand_dims(x, k)
                x = jnp.broadcast_to(x, (*before, number, *after))
        return x

    def collect(self, x, i: int):
        """The cotangent of input `i`, from that of what `spread` has made of it."""
        for _, carried, k in self._positions(i):
            if carried:
                shape = (*x.shape[:k], x.shape[k] * x.shape[k + 1], *x.shape[k + 2 :])
                x = x.reshape(shape)
            else:
                x = jnp.sum(x, k)
        return x
