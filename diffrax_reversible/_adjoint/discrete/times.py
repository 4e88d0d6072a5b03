"""The times of the steps of a solve that has made more of them than are kept."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._autodiff.batch import Batch
from ..._compat import unvmap_any
from ..._loop.problem import Problem, run_again
from ..._loop.record import TimeRecord
from ..._loop.state import differentiated, next_step, num_accepted, resumable
from ..._reversal.stages import at_most_once
from ..._tree import where
from ..._types import BoolScalarLike, IntScalarLike
from .checkpoints import EveryState


class Restarts(eqx.Module):
    """States of the loop from which its steps can be made again: after every so many
    steps as there is room for times.

    - `capacity`: that room.
    """

    states: EveryState
    capacity: int = eqx.field(static=True)

    @property
    def buffers(self) -> list:
        return self.states.buffers

    @staticmethod
    def empty(capacity: int, max_steps: int, state: PyTree) -> "Restarts":
        # The steps since the last of them are still known.
        number = max(max_steps // capacity - 1, 1)
        return Restarts(EveryState.empty(number, _arrays(state)), capacity)

    def keep(self, state: PyTree, accepted: BoolScalarLike) -> "Restarts":
        """The same with the state after a step, if it is one to keep."""
        number = num_accepted(state)
        due = accepted & (number % self.capacity == 0)
        due = due & (number <= self.capacity * self.states.number)
        row = jnp.maximum(number // self.capacity - 1, 0)
        # It is rare, and has many parts.
        states = at_most_once(
            unvmap_any(due),
            lambda states: states.keep(row, _arrays(state), due),
            self.states,
        )
        return Restarts(states, self.capacity)

    def last_before(self, index: IntScalarLike, initial: PyTree) -> PyTree:
        """The last state that has made at most `index` steps; `initial` if none has."""
        number = jnp.minimum(index // self.capacity, self.states.number)
        state = self.states.find(jnp.maximum(number - 1, 0))
        return where(number > 0, state, _arrays(initial))


class Times(eqx.Module):
    """Those that the sweep knows now: of steps number `lowest`, from 0, and later ones.

    - `agrees`: whether steps that were made twice were the same.
    """

    record: TimeRecord
    lowest: IntScalarLike
    agrees: BoolScalarLike

    @property
    def buffers(self) -> list:
        return self.record.buffers

    @staticmethod
    def at_end(record: TimeRecord, batch: Batch) -> "Times":
        lowest = jnp.maximum(batch.max(record.count) - record.capacity, 0)
        return Times(record, lowest, jnp.array(True))

    def reaching(
        self,
        loop: Callable,
        problem: Problem,
        restarts: Restarts,
        number: IntScalarLike,
        remaining: IntScalarLike,
        reach: int,
        batch: Batch,
    ) -> "Times":
        """The times of the `reach` steps before step `number`, from 1, at least: if they
        are not known, all the steps between are made again, by all elements of a batch
        at once."""
        due = (self.lowest > 0) & (number - reach <= self.lowest)
        return at_most_once(
            batch.any(due),
            lambda times: times._made_again(loop, problem, restarts, number, remaining),
            self,
        )

    def _made_again(self, loop, problem, restarts, number, remaining) -> "Times":
        problem, restarts = _stopped((problem, restarts))
        first = jnp.maximum(number - restarts.capacity, 0)
        _, solver_state, *_ = differentiated(problem.state)
        initial = resumable(problem.state, solver_state)
        start = restarts.last_before(first, initial)
        # The first step that is known is made once more, to see whether it is the same.
        known, has_any = self.lowest, remaining > first
        _, last = self.record.interval(known)
        stop = jnp.where(has_any, jnp.minimum(known + 1, remaining), 0)

        def keep(times, before, after):
            index, (t0, t1, made_jump) = num_accepted(before), next_step(before)
            accepted = num_accepted(after) > index
            due = accepted & (index >= first) & (index < known)
            record = times.record.write(index, t0, t1, made_jump, due)
            same = jnp.abs(t1 - last) <= 1e-3 * jnp.abs(t1 - t0)
            agrees = times.agrees & (~accepted | (index != known) | same)
            return Times(record, first, agrees)

        go_on = lambda state: num_accepted(state) < stop
        times = run_again(loop, problem, start, self, keep, go_on)
        return Times(times.record, first, times.agrees)


def _stopped(x: PyTree) -> PyTree:
    dynamic, static = eqx.partition(x, eqx.is_array)
    return eqx.combine(lax.stop_gradient(dynamic), static)


def _arrays(state: PyTree) -> Any:
    return lax.stop_gradient(jtu.tree_map(jnp.asarray, state))
