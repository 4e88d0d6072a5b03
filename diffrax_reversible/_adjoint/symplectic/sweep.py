"""The reverse sweep over steps whose starts are kept."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._loop.problem import join, Problem
from ..._loop.state import differentiated, num_accepted, with_solver_state
from ..._reversal.explicit_runge_kutta import (
    ExplicitRungeKuttaReversal,
    no_stages,
    Stages,
)
from ..._tree import where
from ..._types import IntScalarLike, Y
from ..discrete.checkpoints import Checkpoints, EveryState
from ..discrete.measures import norm
from ..discrete.sweep import AbstractStepSweep, Solved
from .keeps_stages import KeepsStages


class Start(eqx.Module):
    """What is kept of a step: its start and, perhaps, its stages."""

    y: Y
    stages: Stages | None


class Segment(eqx.Module):
    """The steps between two checkpoints, made again.

    - `before`: the number of steps before the first of them.
    """

    starts: EveryState
    before: IntScalarLike


def largest_stride(slots: int, capacity: int) -> int:
    """How far apart `slots` checkpoints of `capacity` steps come to lie."""
    stride = 1
    # As `Checkpoints.keep` doubles it when there is no room for one more.
    while (slots + 1) * stride <= capacity:
        stride *= 2
    return stride


@dataclasses.dataclass(frozen=True, eq=False)
class SymplecticSweep(AbstractStepSweep):
    """Every step is pulled back stage by stage, from its start.

    - `slots`: for checkpoints; `None`: every start is kept.
    - `store_stages`: whether stages are kept, too.
    - `passed_solver_state`: whether what the solver has cached at the start of the solve
        is to be used.
    """

    slots: int | None
    store_stages: bool
    passed_solver_state: bool

    keeps_every_state: ClassVar[bool] = True

    def _start(self, y: Y, solver_state: PyTree, k: PyTree) -> Start:
        if not self.store_stages:
            return Start(y, None)
        f0 = None if solver_state is None else solver_state[1]
        return Start(y, Stages(k, f0))

    def _no_starts(self, problem: Problem, length: int) -> EveryState:
        """Room for so many."""
        y, solver_state, *_ = differentiated(problem.state)
        k = None
        if self.store_stages:
            k = no_stages(type(problem.parameters.solver), y)
        return EveryState.empty(length, self._start(y, solver_state, k))

    @property
    def _stages_in_loop(self) -> bool:
        return self.store_stages and self.slots is None

    def init_states(self, problem):
        if self.slots is not None:
            y, *_ = differentiated(problem.state)
            return Checkpoints.empty(self.slots, y)
        assert self.capacity is not None
        if self._stages_in_loop:
            problem = _without_stages(problem)
        return self._no_starts(problem, self.capacity)

    def keep_states(self, states, problem, before, after):
        del problem
        index, number = num_accepted(before), num_accepted(after)
        accepted = number > index
        y1, solver_state1, *_ = differentiated(after)
        if self.slots is not None:
            return states.keep(number, y1, accepted)
        assert self.capacity is not None
        y0, solver_state0, *_ = differentiated(before)
        k = None
        if self._stages_in_loop:
            solver_state0, _ = solver_state0
            _, k = solver_state1
        start = self._start(y0, solver_state0, k)
        return states.keep(index, start, accepted & (index < self.capacity))

    def evaluate_with_memory(self, inputs):
        if not self._stages_in_loop or self.capacity is None:
            return super().evaluate_with_memory(inputs)
        problem = join(inputs, self.static)
        _, solver_state, *_ = differentiated(problem.state)
        no_k = no_stages(type(problem.parameters.solver), problem.state.y)
        problem = eqx.tree_at(
            lambda p: (p.parameters.solver, p.state),
            problem,
            (
                KeepsStages(problem.parameters.solver),
                with_solver_state(problem.state, (solver_state, no_k)),
            ),
        )
        final, memory = self.run_with_memory(problem)
        _, (solver_state, _), *_ = differentiated(final)
        return with_solver_state(final, solver_state), memory

    def init_carry(self, solved):
        y, solver_state, *_ = differentiated(solved.final)
        segment = None
        if self.slots is not None:
            assert self.capacity is not None
            length = largest_stride(self.slots, self.capacity)
            starts = self._no_starts(solved.problem, length)
            segment = Segment(starts, num_accepted(solved.final))
        return (y, solver_state), segment

    def reversal(self, solved, carry, step, batch):
        problem, segment = solved.problem, carry.extra
        index = step.number - 1
        if segment is None:
            start = solved.memory.states.find(index)
        else:
            segment = self._enter(solved, segment, step, batch)
            start = segment.starts.find(index - segment.before)
        y0, solver_state, *_ = differentiated(problem.state)
        # Zero times something that is not finite must not be added up.
        finite = jnp.isfinite(norm(lax.stop_gradient(start)))
        nothing = Start(y0, jtu.tree_map(jnp.zeros_like, start.stages))
        start = where(finite | (carry.size != 0), start, nothing)
        evaluates_first, cached = True, None
        if solver_state is not None:
            # What this has cached is different at every other step.
            first_step, _ = solver_state
            is_first = step.number == 1
            made_jump = jnp.asarray(solved.steps.made_jump(index))
            evaluates_first = step.active & (is_first & first_step | made_jump)
            if self.passed_solver_state:
                cached = is_first & ~first_step & ~made_jump
        reversal = ExplicitRungeKuttaReversal(
            type(problem.parameters.solver),
            start.y,
            solver_state,
            evaluates_first,
            cached,
            start.stages,
        )
        return reversal, segment

    def _enter(self, solved: Solved, segment, step, batch) -> Segment:
        """The segment that `step` is in: made again from the checkpoint before it, where
        the sweep comes to its last step."""
        problem, checkpoints = solved.problem, solved.memory.states
        parameters, steps = problem.parameters, solved.steps
        y0, solver_state0, *_ = differentiated(problem.state)
        last = step.number - 1
        due = step.active & (last < segment.before)

        def make(loop):
            _, i, y, solver_state, starts = loop
            t0, t1 = steps.interval(i, parameters.span)
            y1, _, dense_info, solver_state1, _ = parameters.solver.step(
                parameters.terms,
                t0,
                t1,
                y,
                parameters.args,
                solver_state,
                steps.made_jump(i),
            )
            start = self._start(y, solver_state, dense_info.get("k"))
            starts = starts.keep(i - before, start, due & (i <= last))
            return go_on(i + 1), i + 1, y1, solver_state1, starts

        def remake():
            found, y = checkpoints.find(before)
            y, solver_state = where(found, y, y0), solver_state0
            if solver_state is not None:
                first_step, f0 = solver_state
                solver_state = (first_step | (before > 0), f0)
            loop = (go_on(before), before, y, solver_state, segment.starts)
            *_, starts = lax.while_loop(lambda loop: loop[0], make, loop)
            return Segment(starts, jnp.where(due, before, segment.before))

        before = last - last % checkpoints.stride
        go_on = lambda i: batch.any(due & (i <= last))
        return lax.cond(batch.any(due), remake, lambda: segment)

    def at_start(self, solved, carry, step, end, batch):
        return end, carry.extra

    def doubt(self, solved, carry):
        y, *_ = differentiated(solved.final)
        return _doubt_of_masked(carry.size, norm(lax.stop_gradient(y)))


@jax.custom_jvp
def _doubt_of_masked(size: Array, y_size: Array) -> Array:
    """Zero. Under forward mode NaN, where the states were left out since there were no
    cotangents, but there are tangents of these."""
    del y_size
    # Not a constant, which `jax.vmap` would give another shape than its tangent.
    return jnp.where(size == 0, jnp.zeros_like(size), 0)


@_doubt_of_masked.defjvp
def _(primals, tangents):
    (size, y_size), (tangent_size, _) = primals, tangents
    wrong = ~jnp.isfinite(y_size) & (size == 0) & (tangent_size != 0)
    return _doubt_of_masked(*primals), jnp.where(wrong, jnp.nan, 0).astype(size.dtype)


def _without_stages(problem: Problem) -> Problem:
    """The problem as it was before its solver came to keep stages."""
    _, (solver_state, _), *_ = differentiated(problem.state)
    return eqx.tree_at(
        lambda p: (p.parameters.solver, p.state),
        problem,
        (
            problem.parameters.solver.solver,
            with_solver_state(problem.state, solver_state),
        ),
    )
