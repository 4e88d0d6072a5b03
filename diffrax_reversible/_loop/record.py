"""The times of the steps of a solve, kept for its reverse sweep."""

import functools as ft
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._compat import buffer_at_set, MaybeBuffer
from .._types import BoolScalarLike, IntScalarLike, RealScalarLike


class TimeRecord(eqx.Module):
    """The accepted steps of a solve: one time for each of them, and two where the vector
    field may jump, since a step then need not start where the one before it ended.

    - `ends`, `starts`: of the steps, of shape `(capacity,)`. `starts` is `None` if each
        starts where the one before it ended.
    - `made_jump`: whether the vector field jumped just before each step; `None` if it
        never does.
    - `count`: of the steps, also those for which there was no room.
    - `first`: where the first of them started.
    - `last`: where the last of them ended.
    - `touch`: whether each did start where the one before it ended.
    - `forgets`: whether a step for which there is no room takes that of the first one
        that is still there; it is dropped else.
    """

    ends: MaybeBuffer[Float[Array, " capacity"]]
    starts: PyTree[MaybeBuffer[Array]]
    made_jump: PyTree[MaybeBuffer[Array]]
    count: IntScalarLike
    first: RealScalarLike
    last: RealScalarLike
    touch: BoolScalarLike
    forgets: bool = eqx.field(static=True)

    @property
    def buffers(self) -> list:
        return [self.ends, self.starts, self.made_jump]

    @property
    def capacity(self) -> int:
        (room,) = self.ends.shape
        return room

    @staticmethod
    def empty(
        capacity: int, t0: RealScalarLike, may_jump: bool, forgets: bool
    ) -> "TimeRecord":
        t0 = jnp.asarray(t0)
        times = jnp.full(capacity, jnp.inf, t0.dtype)
        starts = times if may_jump else None
        made_jump = jnp.zeros(capacity, bool) if may_jump else None
        count, touch = jnp.array(0), jnp.array(True)
        return TimeRecord(times, starts, made_jump, count, t0, t0, touch, forgets)

    def row_of(self, index: IntScalarLike) -> IntScalarLike:
        """Where step number `index` is, from 0."""
        return index % self.capacity if self.forgets else index

    def keep(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        made_jump: BoolScalarLike,
        pred: BoolScalarLike,
    ) -> "TimeRecord":
        """The record with one more step, if `pred`."""
        has_room = self.forgets or self.count < self.capacity
        new = self.write(self.count, t0, t1, made_jump, pred & has_room)
        touch: Any = self.touch & (~cast(Any, pred) | (t0 == self.last))
        return TimeRecord(
            new.ends,
            new.starts,
            new.made_jump,
            self.count + jnp.where(pred, 1, 0),
            self.first,
            jnp.where(pred, t1, self.last),
            touch,
            self.forgets,
        )

    def write(
        self,
        index: IntScalarLike,
        t0: RealScalarLike,
        t1: RealScalarLike,
        made_jump: BoolScalarLike,
        pred: BoolScalarLike,
    ) -> "TimeRecord":
        """The record with step number `index`, from 0, if `pred`."""
        row = self.row_of(index)
        write: Any = ft.partial(buffer_at_set, pred=cast(Any, pred))
        starts, jumps = self.starts, self.made_jump
        if starts is not None:
            starts = write(starts, row, jnp.asarray(t0))
        if jumps is not None:
            jumps = write(jumps, row, jnp.asarray(made_jump))
        ends = write(self.ends, row, jnp.asarray(t1))
        rest = self.count, self.first, self.last, self.touch, self.forgets
        return TimeRecord(ends, starts, jumps, *rest)

    def interval(self, index: IntScalarLike) -> tuple[RealScalarLike, RealScalarLike]:
        """The start and the end of step number `index`, from 0."""
        row = self.row_of(index)
        if self.starts is not None:
            return self.starts[row], self.ends[row]
        before = self.ends[self.row_of(jnp.maximum(index - 1, 0))]
        return jnp.where(index == 0, self.first, before), self.ends[row]

    @property
    def is_complete(self) -> BoolScalarLike:
        """Whether the steps can be told from what is kept."""
        return True if self.starts is not None else self.touch
