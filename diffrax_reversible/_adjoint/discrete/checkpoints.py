"""States of a solve that are kept for its reverse sweep: some of them, or all."""

import functools as ft
from typing import Any, cast

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from ..._compat import buffer_at_set, MaybeBuffer, unvmap_any
from ..._types import BoolScalarLike, IntScalarLike


class Checkpoints(eqx.Module):
    """The states after every `stride`-th step, in any order. When there is no room
    left, `stride` doubles, and every other state makes room: so that at any time
    between half and all of the slots are in use, evenly spread over the solve.

    The states before restarts come first: they are kept, and take the room of others.

    - `states`: with a leading axis of slots.
    - `numbers`: of the steps after which the states were; zero for an empty slot.
    - `is_restart`: whether each of them is that before a restart.
    - `restarts`: how many restarts there were; more than slots if there was no room.
    """

    states: PyTree[Array]
    numbers: Int[Array, " slots"]
    stride: IntScalarLike
    is_restart: Bool[Array, " slots"]
    restarts: IntScalarLike

    @property
    def buffers(self) -> list:
        return [self.states]

    @staticmethod
    def empty(slots: int, state: PyTree[Array]) -> "Checkpoints":
        numbers, is_restart = jnp.zeros(slots, int), jnp.zeros(slots, bool)
        room = _room(slots, state)
        return Checkpoints(room, numbers, jnp.array(1), is_restart, jnp.array(0))

    def keep(
        self,
        number: IntScalarLike,
        state: PyTree[Array],
        accepted: BoolScalarLike,
        restart: BoolScalarLike = False,
    ) -> "Checkpoints":
        """The checkpoints with the state after step `number`, if it is one to keep.
        `restart`: whether a restart is to follow."""
        restart = accepted & jnp.asarray(restart)
        due = accepted & (number % self.stride == 0) | restart
        # Most states are not kept, and then there is nothing to look for.
        find = ft.partial(self._find_slot, number, accepted, restart)
        nothing = lambda: (jnp.zeros_like(jnp.argmax(self.numbers)), due, self._index)
        slot, due, index = lax.cond(unvmap_any(due), find, nothing)
        states = jtu.tree_map(
            lambda x, xs: buffer_at_set(xs, slot, x, pred=cast(Any, due)),
            state,
            self.states,
        )
        return Checkpoints(states, *index)

    @property
    def _index(self) -> tuple:
        return self.numbers, self.stride, self.is_restart, self.restarts

    def _find_slot(self, number, accepted, restart):
        """A slot, whether it is to be written to, and the new index."""
        free, due = self._free(self.stride), accepted & (number % self.stride == 0)
        full = (due | restart) & ~jnp.any(free)
        stride = jnp.where(full, 2 * self.stride, self.stride)
        free = self._free(stride)
        due = accepted & (number % stride == 0) & jnp.any(free)
        due = due | (restart & ~jnp.all(self.is_restart))
        slot = jnp.argmax(jnp.where(jnp.any(free), free, ~self.is_restart))
        here = due & (jnp.arange(len(self.numbers)) == slot)
        numbers = jnp.where(here, number, self.numbers)
        is_restart = self.is_restart | (here & restart)
        restarts = self.restarts + jnp.where(restart, 1, 0)
        return slot, due, (numbers, stride, is_restart, restarts)

    def _free(self, stride: IntScalarLike) -> Bool[Array, " slots"]:
        """The slots that are empty, or make room."""
        return ~self.is_restart & ((self.numbers == 0) | (self.numbers % stride != 0))

    def _has(self, number: IntScalarLike) -> Bool[Array, " slots"]:
        return (self.numbers == number) & (self.numbers > 0)

    def find(self, number: IntScalarLike) -> tuple[Bool[Array, ""], PyTree[Array]]:
        """Whether the state after step `number` was kept, and that state."""
        same = self._has(number)
        slot = jnp.argmax(same)
        return jnp.any(same), jtu.tree_map(lambda xs: xs[slot], self.states)

    def is_before_restart(self, number: IntScalarLike) -> Bool[Array, ""]:
        """Whether a restart followed step `number`."""
        return jnp.any(self._has(number) & self.is_restart)


class EveryState(eqx.Module):
    """One entry for every step.

    - `entries`: with a leading axis of steps.
    """

    entries: PyTree[MaybeBuffer[Array]]

    @property
    def buffers(self) -> list:
        return [self.entries]

    @staticmethod
    def empty(capacity: int, entry: PyTree[Array]) -> "EveryState":
        return EveryState(_room(capacity, entry))

    def keep(
        self, index: IntScalarLike, entry: PyTree[Array], pred: BoolScalarLike
    ) -> "EveryState":
        """All entries, with `entry` at `index` if `pred`."""
        write = lambda x, xs: buffer_at_set(xs, index, x, pred=cast(Any, pred))
        return EveryState(jtu.tree_map(write, entry, self.entries))

    def find(self, index: IntScalarLike) -> PyTree[Array]:
        """The entry at `index`."""
        return jtu.tree_map(lambda xs: xs[index], self.entries)


def _room(number: int, entry: PyTree[Array]) -> PyTree[Array]:
    zeros = lambda x: jnp.zeros((number, *jnp.shape(x)), jnp.result_type(x))
    return jtu.tree_map(zeros, entry)
