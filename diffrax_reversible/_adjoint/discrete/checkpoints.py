"""States of a solve that are kept for its reverse sweep: some of them, or all."""

from typing import Any, cast

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from ..._compat import buffer_at_set, MaybeBuffer, unvmap_any
from ..._tree import where
from ..._types import BoolScalarLike, IntScalarLike


class Checkpoints(eqx.Module):
    """The states after every `stride`-th step, in any order. When there is no room
    left, `stride` doubles, and every other state makes room: so that at any time
    between half and all of the slots are in use, evenly spread over the solve.

    The states before restarts come first: they are kept, and take the room of others.

    - `states`: with a leading axis of slots; perhaps with entries behind these, which
        stay as all were at first.
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
    def empty(slots: int, state: PyTree[Array], spare: int = 0) -> "Checkpoints":
        numbers, is_restart = jnp.zeros(slots, int), jnp.zeros(slots, bool)
        room = _room(slots + spare, state)
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
        # As long as there is room every state has a place of its own.
        place = self._place(number)
        is_free = (number <= self.slots) & (self.numbers[place] == 0)
        is_free = is_free & (self.stride == 1)
        straight = (place, due, self.stride)

        def search():
            return where(is_free, straight, self._search(number, accepted, restart))

        any_search = unvmap_any(due & ~is_free)
        slot, due, stride = lax.cond(any_search, search, lambda: straight)
        write = lambda x, xs: buffer_at_set(xs, slot, x, pred=cast(Any, due))
        set_ = lambda xs, x: xs.at[slot].set(jnp.where(due, x, xs[slot]))
        return Checkpoints(
            jtu.tree_map(write, state, self.states),
            set_(self.numbers, number),
            stride,
            set_(self.is_restart, restart),
            self.restarts + jnp.where(restart, 1, 0),
        )

    @property
    def slots(self) -> int:
        return len(self.numbers)

    def _place(self, number: IntScalarLike) -> Array:
        """Where the state after step `number` is, unless there are more than slots."""
        return jnp.clip(jnp.asarray(number) - 1, 0, self.slots - 1)

    def _search(self, number, accepted, restart):
        """A slot, whether it is to be written to, and the new stride."""
        due, free = accepted & (number % self.stride == 0), self._free(self.stride)
        full = (due | restart) & ~jnp.any(free)
        stride = jnp.where(full, 2 * self.stride, self.stride)
        free = self._free(stride)
        due = accepted & (number % stride == 0) & jnp.any(free)
        due = due | (restart & ~jnp.all(self.is_restart))
        slot = jnp.argmax(jnp.where(jnp.any(free), free, ~self.is_restart))
        return slot.astype(self._place(number).dtype), due, stride

    def _free(self, stride: IntScalarLike) -> Bool[Array, " slots"]:
        """The slots that are empty, or make room."""
        return ~self.is_restart & ((self.numbers == 0) | (self.numbers % stride != 0))

    def slot_of(self, number: IntScalarLike) -> tuple[BoolScalarLike, IntScalarLike]:
        """Whether the state after step `number` was kept, and where."""
        place = self._place(number)
        in_place = self.numbers[place] == number

        def search():
            slot = jnp.argmax(self.numbers == number).astype(place.dtype)
            return jnp.where(in_place, place, slot)

        slot = lax.cond(unvmap_any(~in_place), search, lambda: place)
        return (self.numbers[slot] == number) & (number > 0), slot

    def find(self, number: IntScalarLike) -> tuple[BoolScalarLike, PyTree[Array]]:
        """Whether the state after step `number` was kept, and that state."""
        found, slot = self.slot_of(number)
        return found, jtu.tree_map(lambda xs: xs[slot], self.states)

    def is_before_restart(self, number: IntScalarLike) -> BoolScalarLike:
        """Whether a restart followed step `number`."""
        found, slot = self.slot_of(number)
        return found & self.is_restart[slot]


class SpacedStates(eqx.Module):
    """Something of every `stride`-th step: of all steps, as long as there is a slot for
    each; and then of every second one, every fourth one, and so on, so that between half
    and all of the slots are in use.

    Number `m * stride` is in a slot of its own for every `m` up to the number of slots,
    since that is even and `stride` a power of two. So there is nothing to search for.

    - `states`: with a leading axis of slots; perhaps with entries behind these, which
        stay as all were at first.
    """

    states: PyTree[MaybeBuffer[Array]]
    slots: int = eqx.field(static=True)

    @property
    def buffers(self) -> list:
        return [self.states]

    @staticmethod
    def empty(slots: int, state: PyTree[Array], spare: int = 0) -> "SpacedStates":
        return SpacedStates(_room(slots + spare, state), slots)

    def keep(
        self, number: IntScalarLike, state: PyTree[Array], accepted: BoolScalarLike
    ) -> "SpacedStates":
        """The same with that of step `number`, if it is one to keep."""
        due = accepted & (number % self.stride(number) == 0)
        slot = self.slot_of(number)
        write = lambda x, xs: buffer_at_set(xs, slot, x, pred=cast(Any, due))
        return SpacedStates(jtu.tree_map(write, state, self.states), self.slots)

    def stride(self, number: IntScalarLike) -> Array:
        """How far apart those are that are kept of so many steps."""
        times = jnp.asarray(number) // (self.slots + 1)
        digits = jnp.iinfo(times.dtype).bits - lax.clz(times)
        return jnp.left_shift(jnp.ones_like(times), digits)

    def slot_of(self, number: IntScalarLike) -> Array:
        """Where that of step `number` is, if it is kept."""
        return jnp.maximum(jnp.asarray(number) % (self.slots + 1) - 1, 0)

    def find(self, number: IntScalarLike) -> PyTree[Array]:
        """That of step `number`, if it is kept; else another."""
        slot = self.slot_of(number)
        return jtu.tree_map(lambda xs: xs[slot], self.states)


class EveryState(eqx.Module):
    """One entry for every step.

    - `entries`: with a leading axis of steps.
    """

    entries: PyTree[MaybeBuffer[Array]]

    @property
    def buffers(self) -> list:
        return [self.entries]

    @property
    def number(self) -> int:
        """How many there is room for."""
        return jtu.tree_leaves(self.entries)[0].shape[0]

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
    # Filled with an entry that is safe to read.
    return jtu.tree_map(lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x))), entry)
