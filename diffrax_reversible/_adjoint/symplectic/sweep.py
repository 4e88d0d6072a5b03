"""The reverse sweep over steps whose starts are kept."""

import dataclasses
import math

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
    """Steps between two kept ones, made again.

    - `before`: the number of steps before the first of them.
    """

    starts: EveryState
    before: IntScalarLike


def largest_stride(slots: int, max_steps: int) -> int:
    """How far apart the kept ones of so many starts come to lie."""
    stride = 1
    # As `Checkpoints.keep` doubles it when there is no room for one more.
    while (slots + 1) * stride <= max_steps:
        stride *= 2
    return stride


# The states that are kept by default, unless the square root of `max_steps` is more.
default_slots = 64


@dataclasses.dataclass(frozen=True, eq=False)
class SymplecticSweep(AbstractStepSweep):
    """Every step is pulled back stage by stage, from its start.

    The starts of every `stride`-th step are kept, and the steps in between made again,
    as many as there are slots at a time.

    - `slots`: for starts; `None`: the default.
    - `store_stages`: whether stages are kept, too.
    - `passed_solver_state`: whether what the solver has cached at the start of the solve
        is to be used.
    """

    slots: int | None
    store_stages: bool
    passed_solver_state: bool

    def _start(self, y: Y, solver_state: PyTree, k: PyTree) -> Start:
        if not self.store_stages:
            return Start(y, None)
        f0 = None if solver_state is None else solver_state[1]
        return Start(y, Stages(k, f0))

    def _no_start(self, problem: Problem) -> Start:
        y, solver_state, *_ = differentiated(problem.state)
        k = None
        if self.store_stages:
            k = no_stages(type(problem.parameters.solver), y)
        return self._start(y, solver_state, k)

    def _number_of_slots(self, problem: Problem) -> int:
        max_steps = problem.options["max_steps"]
        if self.slots is not None:
            return self.slots
        if max_steps is None:
            return 2 * default_slots
        return min(max(default_slots, math.isqrt(max_steps)), max_steps)

    def init_states(self, problem):
        slots = self._number_of_slots(problem)
        if self.store_stages:
            problem = _without_stages(problem)
        return Checkpoints.empty(slots, self._no_start(problem))

    def keep_states(self, states, problem, before, after):
        del problem
        number = num_accepted(after)
        y, solver_state, *_ = differentiated(before)
        k = None
        if self.store_stages:
            solver_state, _ = solver_state
            _, (_, k), *_ = differentiated(after)
        start = self._start(y, solver_state, k)
        return states.keep(number, start, number > num_accepted(before))

    def evaluate_with_memory(self, inputs):
        if not self.store_stages or self._lacks_capacity(join(inputs, self.static)):
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
        length = self._number_of_slots(solved.problem)
        max_steps = solved.problem.options["max_steps"]
        if max_steps is not None:
            length = min(length, largest_stride(length, max_steps))
        starts = EveryState.empty(length, self._no_start(solved.problem))
        return (y, solver_state), Segment(starts, num_accepted(solved.final))

    def reversal(self, solved, carry, step, batch):
        problem, kept = solved.problem, solved.memory.states
        index = step.number - 1
        found, start = kept.find(step.number)
        segment = self._enter(solved, carry.extra, step, found, batch)
        start = where(found, start, segment.starts.find(index - segment.before))
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

    def _enter(self, solved: Solved, segment: Segment, step, found, batch) -> Segment:
        """The segment that `step` is in, unless its start has been `found`: made again
        from the last kept start before it, where the sweep comes to its last step."""
        problem, kept, steps = solved.problem, solved.memory.states, solved.steps
        parameters, span = problem.parameters, problem.parameters.span
        y0, solver_state0, *_ = differentiated(problem.state)
        index = step.number - 1
        due = step.active & ~found & (index < segment.before)
        last_kept = step.number - step.number % kept.stride
        first = jnp.maximum(last_kept - 1, 0)
        length = len(jtu.tree_leaves(segment.starts.entries)[0])
        before = jnp.maximum(first, index - length + 1)
        # Without stages the last step need not be made.
        end = index + 1 if self.store_stages else index

        def make(loop):
            _, i, y, solver_state, starts = loop
            t0, t1 = steps.interval(i, span)
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
            go_on = due & (i < end)
            starts = starts.keep(i - before, start, go_on & (i >= before))
            y = where(go_on, y1, y)
            return batch.any(due & (i + 1 < end)), i + 1, y, solver_state1, starts

        def remake():
            _, start = kept.find(last_kept)
            y, solver_state = where(last_kept > 0, start.y, y0), solver_state0
            if solver_state is not None:
                t0, _ = steps.interval(first, span)
                first_step, f0 = solver_state
                f = parameters.terms.vf(t0, y, parameters.args)
                f0 = where(last_kept > 1, f, f0)
                solver_state = (first_step & (last_kept <= 1), f0)
            loop = (batch.any(due & (first < end)), first, y, solver_state)
            *_, y, _, starts = lax.while_loop(
                lambda loop: loop[0], make, (*loop, segment.starts)
            )
            if not self.store_stages:
                starts = starts.keep(index - before, Start(y, None), due)
            return Segment(starts, jnp.where(due, before, segment.before))

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
