"""States of a solve that are kept for its reverse sweep: some of them, or all."""

from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from ..._compat import buffer_at_set, MaybeBuffer
from ..._types import BoolScalarLike, IntScalarLike


class Checkpoints(eqx.Module):
    """The states after every `stride`-th step, in any order. When there is no room
    left, `stride` doubles, and every other state makes room: so that at any time
    between half and all of the slots are in use, evenly spread over the solve.

    - `states`: with a leading axis of slots.
    - `numbers`: of the steps after which the states were; zero for an empty slot.
    """

    states: PyTree[Array]
    numbers: Int[Array, " slots"]
    stride: IntScalarLike

    @property
    def buffers(self) -> list:
        return [self.states]

    @staticmethod
    def empty(slots: int, state: PyTree[Array]) -> "Checkpoints":
        return Checkpoints(_room(slots, state), jnp.zeros(slots, int), jnp.array(1))

    def keep(
        self, number: IntScalarLike, state: PyTree[Array], accepted: BoolScalarLike
    ) -> "Checkpoints":
        """The checkpoints with the state after step `number`, if it is one to keep."""
        full = jnp.all((self.numbers > 0) & (self.numbers % self.stride == 0))
        due = accepted & (number % self.stride == 0)
        stride = jnp.where(due & full, 2 * self.stride, self.stride)
        due = due & (number % stride == 0)
        slot = jnp.argmax((self.numbers == 0) | (self.numbers % stride != 0))
        states = jtu.tree_map(
            lambda x, xs: buffer_at_set(xs, slot, x, pred=cast(Any, due)),
            state,
            self.states,
        )
        numbers = jnp.where(
            due & (jnp.arange(len(self.numbers)) == slot), number, self.numbers
        )
        return Checkpoints(states, numbers, stride)

    def find(self, number: IntScalarLike) -> tuple[Bool[Array, ""], PyTree[Array]]:
        """Whether the state after step `number` was kept, and that state."""
        same = (self.numbers == number) & (self.numbers > 0)
        slot = jnp.argmax(same)
        return jnp.any(same), jtu.tree_map(lambda xs: xs[slot], self.states)


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
