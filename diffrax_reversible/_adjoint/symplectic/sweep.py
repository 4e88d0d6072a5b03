"""The reverse sweep over steps whose starts are kept."""

import dataclasses
import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver
from jaxtyping import Array, PyTree

from ..._autodiff.linearisation import Linearisation
from ..._autodiff.sweep import Inputs
from ..._loop.problem import join, Problem
from ..._loop.state import (
    differentiated,
    next_step,
    num_accepted,
    solver_failed,
    with_solver_state,
)
from ..._reversal.base import StepInputs
from ..._reversal.diagonal_runge_kutta import (
    DiagonalRungeKuttaReversal,
    first_slope,
    LinearSystems,
    solve_stages,
)
from ..._reversal.explicit_runge_kutta import ExplicitRungeKuttaReversal
from ..._reversal.failure import doubt_of_failed, doubt_of_masked, or_nan
from ..._reversal.stages import (
    linearise_stage,
    shared_residuals,
    StageResiduals,
    Stages,
)
from ..._solver.runge_kutta.tableau import steps_by_tableau
from ..._tree import where
from ..._types import IntScalarLike, Y
from ..discrete.checkpoints import EveryState, SpacedStates
from ..discrete.measures import norm
from ..discrete.sweep import AbstractStepSweep, Solved
from .keeping import AbstractKeepingSolver, KeepsResiduals, KeepsStages


class Start(eqx.Module):
    """What is kept of a step: its start and, perhaps, its stages, or the residuals of
    their derivatives that vary. Of an implicit solver that hands on its last stage this is
    always kept."""

    y: Y
    stages: Stages | None
    residuals: list[Array] | None
    linearisation: Linearisation | None = eqx.field(static=True)


class Segment(eqx.Module):
    """Steps between two kept ones, made again.

    - `before`: the number of steps before the first of them: the same for all elements of
        a batch.
    - `stride`: how far apart kept ones are, for the element with most steps.
    - `nothing`: what is safe to pull back where there is nothing to.
    """

    starts: EveryState
    before: IntScalarLike
    stride: IntScalarLike
    nothing: Start


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
    - `keep`: what is kept of a step: "states", "stages" or "residuals".
    - `passed_solver_state`: whether what the solver has cached at the start of the solve
        is to be used.
    - `systems`: how the linear systems of implicit stages are solved.
    """

    slots: int | None
    keep: str
    passed_solver_state: bool
    systems: LinearSystems

    def _start(self, solver: AbstractSolver, y: Y, solver_state: PyTree, kept) -> Start:
        """The start of a step of `solver`, and what it has `kept` of it."""
        f0 = None if solver_state is None else solver_state[1]
        if isinstance(solver, KeepsStages):
            # At the start of the solve it may be a constant.
            f0 = jtu.tree_map(jnp.asarray, f0)
            return Start(y, Stages(kept, f0), None, None)
        if isinstance(solver, KeepsResiduals):
            f0, residuals = kept
            return Start(y, Stages(None, f0), residuals, solver.linearisation)
        if f0 is not None and not steps_by_tableau(type(solver)):
            # It is a root, which the vector field at `y` is not: where that is stiff it
            # makes much of what is missing from it.
            f0 = jtu.tree_map(jnp.asarray, f0)
            return Start(y, Stages(None, f0), None, None)
        return Start(y, None, None, None)

    def _number_of_slots(self, problem: Problem) -> int:
        max_steps, slots = problem.options["max_steps"], self.slots
        if slots is None and max_steps is None:
            slots = 2 * default_slots
        elif slots is None:
            slots = max(default_slots, math.isqrt(max_steps))
        if max_steps is not None and slots >= max_steps:
            return max_steps
        # To be thinned their number is to be even.
        return max(slots - slots % 2, 2)

    def _linearise(self, problem: Problem, perturbed: Inputs) -> Linearisation | None:
        if self.keep != "residuals":
            return None
        y, solver_state, *_ = differentiated(problem.state)
        of = perturbed.parameters
        times = any(jtu.tree_leaves(of.span))
        has_cache = solver_state is not None
        is_perturbed = (of.terms, of.args)
        return linearise_stage(_inputs_of(problem), y, has_cache, is_perturbed, times)

    def _keeping(self, solver: AbstractSolver, linearisation: Linearisation | None):
        """The solver, made to keep what there is to be kept of its steps."""
        if linearisation is not None:
            return KeepsResiduals(solver, linearisation)
        return KeepsStages(solver) if self.keep == "stages" else solver

    def evaluate_with_memory(self, inputs, perturbed):
        problem = join(inputs, self.static)
        if self._lacks_capacity(problem):
            return super().evaluate_with_memory(inputs, perturbed)
        linearisation = self._linearise(problem, perturbed)
        solver = self._keeping(problem.parameters.solver, linearisation)
        if not isinstance(solver, AbstractKeepingSolver):
            return self.run_with_memory(problem)
        _, solver_state, *_ = differentiated(problem.state)
        nothing = _nothing_kept(solver, problem)
        problem = eqx.tree_at(
            lambda p: (p.parameters.solver, p.state),
            problem,
            (solver, with_solver_state(problem.state, (solver_state, nothing))),
        )
        final, memory = self.run_with_memory(problem)
        solver_state, _ = _solver_state_and_kept(solver, final)
        return with_solver_state(final, solver_state), memory

    def reach(self, problem):
        max_steps = problem.options["max_steps"]
        slots = self._number_of_slots(problem)
        return super().reach(problem) + largest_stride(slots, max_steps)

    def plain_solver_state(self, problem, state):
        solver_state, _ = _solver_state_and_kept(problem.parameters.solver, state)
        return solver_state

    def _keeps_all(self, problem: Problem) -> bool:
        """Whether there is a slot for every step."""
        max_steps = problem.options["max_steps"]
        return max_steps is not None and self._number_of_slots(problem) >= max_steps

    def init_states(self, problem):
        solver = problem.parameters.solver
        y, *_ = differentiated(problem.state)
        nothing = self._start(solver, y, *_solver_state_and_kept(solver, problem.state))
        spare = 0 if nothing.linearisation is None else 1
        return SpacedStates.empty(self._number_of_slots(problem), nothing, spare)

    def keep_states(self, states, problem, before, after):
        solver = problem.parameters.solver
        number = num_accepted(after)
        y, *_ = differentiated(before)
        solver_state, _ = _solver_state_and_kept(solver, before)
        _, kept = _solver_state_and_kept(solver, after)
        start = self._start(solver, y, solver_state, kept)
        return states.keep(number, start, number > num_accepted(before))

    def init_carry(self, solved, batch):
        y, solver_state, *_ = differentiated(solved.final)
        length = self._number_of_slots(solved.problem)
        max_steps = solved.problem.options["max_steps"]
        if max_steps is not None:
            length = min(length, largest_stride(length, max_steps))
        problem = solved.problem
        linearisation = solved.memory.states.states.linearisation
        y0, solver_state0, *_ = differentiated(problem.state)
        solver = self._keeping(problem.parameters.solver, linearisation)
        nothing = self._start(
            solver,
            y0,
            solver_state0,
            _nothing_kept(solver, problem),
        )
        starts = EveryState.empty(length, nothing)
        most = batch.max(num_accepted(solved.final))
        stride = solved.memory.states.stride(most)
        segment = Segment(starts, most, stride, nothing)
        return (y, solver_state), segment

    def reversal(self, solved, carry, step, batch):
        problem, kept = solved.problem, solved.memory.states
        index, every = step.number - 1, kept.states
        segment, row = carry.extra, kept.slot_of(step.number)
        start = kept.find(step.number)
        if not self._keeps_all(problem):
            found = carry.number % segment.stride == 0
            segment = self._enter(solved, segment, carry, step, found, batch)
            start = where(found, start, segment.starts.find(index - segment.before))
        _, solver_state, *_ = differentiated(problem.state)
        # Zero times something that is not finite must not be added up.
        finite = jnp.isfinite(norm(lax.stop_gradient((start.y, start.stages))))
        okay = finite | (carry.size != 0)
        start = where(okay, start, segment.nothing)
        residuals, linearisation = None, kept.states.linearisation
        if linearisation is not None:
            # Large, and so looked up where they are. The spare row is safe.
            values, row = every.residuals, jnp.where(okay, row, kept.slots)
            if not self._keeps_all(problem):
                values, row = [x[None] for x in start.residuals], 0
            # Carried, they would be another copy for each element of a batch.
            shared = shared_residuals(linearisation, _inputs_of(problem), start.y)
            residuals = StageResiduals(values, row, shared, linearisation)
        evaluates_first, cached = True, None
        if solver_state is not None:
            # What this has cached is different at every other step.
            first_step, _ = solver_state
            is_first = step.number == 1
            made_jump = jnp.asarray(step.made_jump)
            evaluates_first = step.active & (is_first & first_step | made_jump)
            if self.passed_solver_state:
                cached = is_first & ~first_step & ~made_jump
        kind = type(problem.parameters.solver)
        if not steps_by_tableau(kind):
            y1, _ = carry.end
            y1 = where(okay, y1, start.y)
            stages = start.stages
            if stages is None or stages.k is None:
                f0 = None if stages is None else stages.f0
                stages = solve_stages(
                    step, start.y, y1, f0, evaluates_first, carry.size, batch
                )
            reversal = DiagonalRungeKuttaReversal(
                kind,
                start.y,
                solver_state,
                evaluates_first,
                stages,
                self.systems,
                carry.size,
            )
            return reversal, segment
        reversal = ExplicitRungeKuttaReversal(
            kind,
            start.y,
            solver_state,
            evaluates_first,
            cached,
            start.stages,
            residuals,
        )
        return reversal, segment

    def _enter(
        self, solved: Solved, segment: Segment, carry, step, found, batch
    ) -> Segment:
        """The segment that the next step is in, unless its start has been `found`: made
        again from the last kept start before it, where the sweep comes to its last
        step; by all elements of a batch at once, also those which wait for it to come to
        theirs."""
        problem, kept, steps = (
            solved.problem,
            solved.memory.states,
            self.steps(solved, carry),
        )
        parameters, span = problem.parameters, problem.parameters.span
        y0, solver_state0, *_ = differentiated(problem.state)
        enters = ~found & (carry.number <= segment.before)
        last_kept = carry.number - carry.number % segment.stride
        first = jnp.maximum(last_kept - 1, 0)
        length = segment.starts.number
        before = jnp.maximum(first, carry.number - length)
        index = carry.remaining - 1
        due = enters & (index >= before)
        linearisation = kept.states.linearisation
        solver = self._keeping(parameters.solver, linearisation)
        keeps = isinstance(solver, AbstractKeepingSolver)
        is_explicit = steps_by_tableau(type(parameters.solver))
        # If only its start is needed, the last step need not be made.
        end = index + 1 if keeps else index

        def make(loop):
            _, i, y, solver_state, starts = loop
            # An element that does not go on makes a step that there is.
            go_on = due & (i < end)
            number = jnp.minimum(i, jnp.maximum(index, 0))
            t0, t1 = steps.interval(number, span)
            made_jump = steps.made_jump(number)
            if not is_explicit and solver_state is not None:
                # Not for all elements of a batch where one has to.
                first_step, f0 = solver_state
                evaluates = jnp.asarray(first_step | made_jump)
                f0 = first_slope(parameters, t0, y, f0, evaluates, batch)
                solver_state = (jnp.zeros_like(first_step), f0)
                made_jump = False
            y1, _, _, solver_state1, result = solver.step(
                parameters.terms,
                t0,
                t1,
                y,
                parameters.args,
                (solver_state, None) if keeps else solver_state,
                made_jump,
            )
            solver_state1, made = solver_state1 if keeps else (solver_state1, None)
            start = self._start(solver, y, solver_state, made)
            starts = starts.keep(i - before, start, go_on & (i >= before))
            # A root finder may fail this time.
            y = where(go_on, or_nan(result, y1), y)
            if not is_explicit:
                solver_state1 = where(go_on, solver_state1, solver_state)
            return batch.any(due & (i + 1 < end)), i + 1, y, solver_state1, starts

        def remake():
            start = kept.find(last_kept)
            y, solver_state = where(last_kept > 0, start.y, y0), solver_state0
            if solver_state is not None:
                t0, _ = steps.interval(first, span)
                first_step, f0 = solver_state
                if is_explicit:
                    f = parameters.terms.vf(t0, y, parameters.args)
                else:
                    f = start.stages.f0
                f0 = where(last_kept > 1, f, f0)
                solver_state = (first_step & (last_kept <= 1), f0)
            loop = (batch.any(due & (first < end)), first, y, solver_state)
            *_, y, solver_state, starts = lax.while_loop(
                lambda loop: loop[0], make, (*loop, segment.starts)
            )
            if not keeps:
                start = self._start(solver, y, solver_state, None)
                starts = starts.keep(index - before, start, due)
            return starts, jnp.where(enters, before, segment.before)

        starts, before = lax.cond(
            batch.any(due), remake, lambda: (segment.starts, segment.before)
        )
        changed = lambda s: (s.starts, s.before)
        return eqx.tree_at(changed, segment, (starts, before))

    def at_start(self, solved, carry, step, end, batch):
        return end, carry.extra

    def doubt(self, solved, carry):
        y, *_ = differentiated(solved.final)
        doubt = doubt_of_masked(carry.size, norm(lax.stop_gradient(y)))
        return doubt + doubt_of_failed(carry.size, solver_failed(solved.final))


def _inputs_of(problem: Problem) -> StepInputs:
    """Those of a step of length zero at the start of the solve, which is safe."""
    parameters, (t0, _, _) = problem.parameters, next_step(problem.state)
    return StepInputs(parameters.solver, parameters.terms, parameters.args, t0, t0)


def _nothing_kept(solver: AbstractSolver, problem: Problem) -> PyTree:
    """What `solver` keeps of such a step."""
    if not isinstance(solver, AbstractKeepingSolver):
        return None
    y, solver_state, *_ = differentiated(problem.state)
    return solver.nothing_kept(_inputs_of(problem), y, solver_state)


def _solver_state_and_kept(solver: AbstractSolver, state) -> tuple[PyTree, PyTree]:
    """The solver state, and what `solver` has kept of the step that led to it."""
    _, solver_state, *_ = differentiated(state)
    if isinstance(solver, AbstractKeepingSolver):
        solver_state, kept = solver_state
        return solver_state, kept
    return solver_state, None
