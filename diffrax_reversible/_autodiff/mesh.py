"""Sums over a batch that lies on several devices.

A parameter that the elements of a batch share has one cotangent, their sum, and the
devices would have to agree on it in every step of the walk. So a vmapped axis of which
`spmd_axis_name` says that it is spread over the mesh becomes two, one over the devices
and one over the elements that each has. Over the first, each device has a copy of the
parameter, and a cotangent of its own; these are added up at the end.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .vmaps import Level


def _mesh_shape(operands) -> dict:
    """The sizes of the axes of the mesh on which the operands lie, if on any."""
    for x in operands:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.empty:
            return dict(mesh.shape)
    return {}


def _num_devices(level: Level, mesh_shape: dict) -> int:
    spmd_name = level.spmd_name
    names = spmd_name if isinstance(spmd_name, tuple) else (spmd_name,)
    number = math.prod(mesh_shape.get(name, 1) for name in names)
    # An axis by whose name the vector field communicates has to stay whole.
    whole = type(level.name) is not object or level.size % number != 0
    return 1 if whole else number


class Devices:
    """How the operands of a function that is vmapped over `levels` lie on devices.

    - `shared`: which inputs are to get a copy on each.
    - `levels`: those after `spread`.
    """

    def __init__(self, levels: Sequence[Level], shared: Sequence[int], operands):
        mesh_shape = _mesh_shape(operands)
        self._given = levels
        self._numbers = [_num_devices(level, mesh_shape) for level in levels]
        self._shared = shared
        self.levels = tuple(self._split_levels())

    def _split_levels(self):
        for level, number in zip(self._given, self._numbers):
            if number == 1:
                yield level
                continue
            mapped = [m or i in self._shared for i, m in enumerate(level.mapped)]
            yield dataclasses.replace(
                level, size=level.size // number, name=object(), spmd_name=None
            )
            yield dataclasses.replace(
                level, size=number, name=object(), mapped=tuple(mapped)
            )

    def _axes(self, i: int | None):
        """For each level whether input `i` (`None`: an output) carries it, and which
        axis that is or, if it does not, would be."""
        axis = 0
        for level, number in reversed(list(zip(self._given, self._numbers))):
            carried = i is None or level.mapped[i]
            yield number, carried, axis
            axis += carried

    def spread(self, x, i: int | None = None):
        """Input `i`, or an output, as a function that is vmapped over `levels` wants
        it."""
        for number, carried, axis in reversed(list(self._axes(i))):
            if number == 1:
                continue
            if carried:
                shape = (number, x.shape[axis] // number)
                x = x.reshape(x.shape[:axis] + shape + x.shape[axis + 1 :])
            elif i in self._shared:
                x = jnp.broadcast_to(
                    jnp.expand_dims(x, axis),
                    x.shape[:axis] + (number,) + x.shape[axis:],
                )
        return x

    def collect(self, x, i: int):
        """The cotangent of input `i`, from that of what `spread` has made of it."""
        for number, carried, axis in self._axes(i):
            if number == 1:
                continue
            if carried:
                shape = (x.shape[axis] * x.shape[axis + 1],)
                x = x.reshape(x.shape[:axis] + shape + x.shape[axis + 2 :])
            elif i in self._shared:
                x = jnp.sum(x, axis)
        return x
