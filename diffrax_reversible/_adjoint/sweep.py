"""The reverse sweep: walks the accepted steps of a solve backwards."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, PyTree

from .._compat import depends, save_y
from .._controller import Steps
from .._solver import AbstractReversibleSolver, as_reversible
from .._types import IntScalarLike, RealScalarLike
from .abstract_sweep import AbstractSweep, Batch, Inputs
from .accuracy import check, OnInaccurate, reversal_loss
from .checkpoints import Checkpoints
from .problem import differentiated, is_none, join, Problem, run, save_states
from .saves import Cursor, pull_back, Saver, Step


class _Walk(eqx.Module):
    """- `loss`, `t_loss`: the largest loss of the reversal so far, and where it was."""

    remaining: IntScalarLike
    cursors: list[Cursor]
    y: PyTree
    solver_state: PyTree
    cotangent_y: PyTree
    cotangent_solver_state: PyTree
    loss: Array
    t_loss: RealScalarLike


def _where(pred, x, y):
    if pred is True:
        return x
    if isinstance(y, int):
        return jtu.tree_map(lambda a: jnp.where(pred, a, y), x)
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


class ReversibleSweep(AbstractSweep):
    """The loop of a solve and its reverse: every step is undone, and pulled back at the
    state that was found.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `slots`: for checkpoints.
    - `rtol`, `on_inaccurate`: what loss to accept, and what to do about a larger one.
    """

    refusal = (
        "`adjoint=ReversibleAdjoint()` does not differentiate with respect to a value "
        "that a callable closes over, other than the vector field and "
        "`SaveAt(fn=...)`. Pass it through `args`, or make the callable an "
        "`equinox.Module` of which it is a field; or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )

    def __init__(
        self,
        loop: Callable,
        static: PyTree,
        slots: int | None,
        rtol: float,
        on_inaccurate: OnInaccurate,
    ):
        self.loop = loop
        self.static = static
        self.slots = slots
        self.rtol = rtol
        self.on_inaccurate: OnInaccurate = on_inaccurate

    def evaluate(self, inputs: Inputs) -> PyTree:
        problem = join(inputs, self.static)
        checkpoints = None
        if self.slots is not None:
            state = (problem.state.y, problem.state.solver_state)
            checkpoints = Checkpoints.empty(self.slots, state)
        return run(self.loop, problem, checkpoints)

    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> _Walk:
        problem = join(inputs, self.static)
        final, _ = outputs
        cotangent, _ = cotangents
        cursors = [Cursor(s.save_index, s.saveat_ts_index) for s in save_states(final)]
        return _Walk(
            final.num_accepted_steps,
            cursors,
            *as_reversible(problem.solver).depart(
                problem.parameters.terms, final.tprev, final.y, final.solver_state
            ),
            cotangent.y,
            cotangent.solver_state,
            jnp.zeros((), jnp.finfo(jnp.result_type(*jtu.tree_leaves(final.y))).dtype),
            final.tprev,
        )

    def active(self, carry: _Walk) -> Bool[ArrayLike, "..."]:
        return carry.remaining > 0

    def step(
        self,
        inputs: Inputs,
        outputs: PyTree,
        cotangents: PyTree,
        carry: _Walk,
        cotangent_parameters: PyTree,
        batch: Batch,
    ) -> tuple[_Walk, PyTree]:
        problem = join(inputs, self.static)
        solver = as_reversible(problem.solver)
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, cotangent_parameters, inputs.parameters, is_leaf=is_none
        )
        rebuild = lambda parameters: eqx.combine(parameters, problem.parameters)
        final, checkpoints = outputs
        cotangent, _ = cotangents
        step = self._current_step(problem, rebuild, final, carry, batch, parameters)
        last = step.active & (step.number == final.num_accepted_steps)
        savers = self._savers(problem, rebuild, cotangent)
        cursors = list(carry.cursors)

        def rebuild_step(parameters):
            t0, t1 = step.interval(parameters)
            parameters = rebuild(parameters)
            return parameters.terms, parameters.args, t0, t1

        y, solver_state = solver.arrive(
            rebuild_step, parameters, carry.y, carry.solver_state
        )

        # What the end of the step was used for.
        cotangent_y, cotangent_solver_state = _where(
            step.active, (carry.cotangent_y, carry.cotangent_solver_state), 0
        )
        total = (cotangent_y, cotangent_parameters)
        for i, saver in enumerate(savers):
            if saver.steps != 0:
                total, cursors[i] = saver.pull_back_end(
                    step, cursors[i], y, parameters, total, batch
                )
        cotangent_y, cotangent_parameters = total
        cotangent_parameters = self._pull_back_times(
            step, last, cotangent, parameters, cotangent_parameters, batch
        )

        # What its inside was used for.
        def backward_step():
            args, terms = problem.parameters.args, problem.parameters.terms
            _, dense_info, _, _ = solver.backward_step(
                terms,
                step.t0,
                step.t1,
                y,
                args,
                (step.t_previous,),
                solver_state,
                step.made_jump,
            )
            return dense_info

        cotangent_dense_info = None
        with_ts = [i for i, saver in enumerate(savers) if saver.ts is not None]
        # What side steps have saved depends on the start of the step, known later.
        side_steps = []
        if isinstance(solver, AbstractReversibleSolver):
            if solver.interpolates_from_start:
                side_steps, with_ts = with_ts, []
        has_event = problem.options["event"] is not None
        if problem.saveat.dense or has_event or len(with_ts) > 0:
            dense_info = jtu.tree_map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                eqx.filter_eval_shape(backward_step),
            )
            cotangent_dense_info = dense_info
            if problem.saveat.dense:
                row = jtu.tree_map(lambda x: x[step.number - 1], cotangent.dense_infos)
                cotangent_dense_info = _where(step.active, row, 0)
            if has_event:
                cotangent_dense_info = jtu.tree_map(
                    lambda total, x: total + jnp.where(last, x, 0),
                    cotangent_dense_info,
                    cotangent.event_dense_info,
                )
            total = (cotangent_dense_info, cotangent_parameters)
            if len(with_ts) > 0 and not self._is_linear(
                problem, rebuild, savers, parameters
            ):
                # What is saved is not linear in `dense_info`, so that this must be
                # known: at the cost of one more `backward_step`.
                pending = [
                    savers[i].has_pending(step, cursors[i], parameters) for i in with_ts
                ]
                dense_info = lax.cond(
                    batch.any(ft.reduce(jnp.logical_or, pending)),
                    backward_step,
                    lambda: dense_info,
                )

            def interpolate(parameters, dense_info, t):
                t0, t1 = step.interval(parameters)
                interpolation = problem.solver.interpolation_cls(
                    t0=t0, t1=t1, **dense_info
                )
                return interpolation.evaluate(t)

            for i in with_ts:
                total, cursors[i] = savers[i].pull_back_ts(
                    step, cursors[i], interpolate, dense_info, parameters, total, batch
                )
            cotangent_dense_info, cotangent_parameters = total

        # The step itself.
        y, solver_state, cotangent_y, cotangent_solver_state, cotangent_parameters = (
            solver.pull_back_step(
                rebuild_step,
                parameters,
                y,
                (step.t_previous,),
                solver_state,
                step.made_jump,
                cotangent_y,
                cotangent_solver_state,
                cotangent_dense_info,
                batch.accumulate,
                cotangent_parameters,
            )
        )
        if len(side_steps) > 0:
            assert isinstance(solver, AbstractReversibleSolver)
            total = dict(y0=cotangent_y, solver_state=cotangent_solver_state)
            total = (total, cotangent_parameters)

            def side_step(parameters, start, t):
                terms, args, t0, _ = rebuild_step(parameters)
                return solver.side_step(
                    terms, args, t0, t, made_jump=step.made_jump, **start
                )

            for i in side_steps:
                start = dict(y0=y, solver_state=solver_state)
                total, cursors[i] = savers[i].pull_back_ts(
                    step, cursors[i], side_step, start, parameters, total, batch
                )
            total, cotangent_parameters = total
            cotangent_y, cotangent_solver_state = total["y0"], total["solver_state"]
        loss, t_loss = carry.loss, carry.t_loss
        if checkpoints is not None:
            found, known = checkpoints.find(step.number - 1)

            def restart():
                y0 = self._arrived(problem, step.t0, y, solver_state)
                terms = problem.parameters.terms
                departure = solver.depart(terms, step.t0, *known)
                return departure, reversal_loss(y0, known[0], final.y)

            (y, solver_state), new_loss = lax.cond(
                batch.any(found),
                lambda: _where(found, restart(), ((y, solver_state), 0 * loss)),
                lambda: ((y, solver_state), 0 * loss),
            )
            t_loss = jnp.where(new_loss > loss, step.t0, t_loss)
            loss = jnp.where(new_loss > loss, new_loss, loss)
        new = _Walk(
            carry.remaining - 1,
            cursors,
            y,
            solver_state,
            cotangent_y,
            cotangent_solver_state,
            loss,
            t_loss,
        )
        return _where(step.active, new, carry), cotangent_parameters

    def finish(
        self, inputs: Inputs, outputs: PyTree, cotangents: PyTree, carry: _Walk
    ) -> tuple[PyTree, Bool[Array, ""]]:
        final, _ = outputs
        known, *_ = inputs.state
        problem = join(inputs, self.static)
        t0 = problem.parameters.span.t0
        y0 = self._arrived(problem, t0, carry.y, carry.solver_state)
        loss = reversal_loss(y0, known, final.y)
        worse = ~(loss <= carry.loss)
        t_loss = jnp.where(worse, t0, carry.t_loss)
        loss = jnp.where(worse, loss, carry.loss)
        trusted = check(loss, t_loss, self.rtol, self.on_inaccurate)
        _, _, *buffers = differentiated(cotangents[0])
        state = (carry.cotangent_y, carry.cotangent_solver_state, *buffers)
        return state, trusted

    @staticmethod
    def _arrived(problem, t, y, solver_state):
        """The solution at `t`, from what the walk carries there."""
        terms, args = problem.parameters.terms, problem.parameters.args
        rebuild = lambda _: (terms, args, t, t)
        y, _ = as_reversible(problem.solver).arrive(rebuild, None, y, solver_state)
        return y

    @staticmethod
    def _current_step(problem, rebuild, final, carry, batch, parameters) -> Step:
        # Outside a batch the loop ends when there is nothing left to walk.
        active = True if len(batch.names) == 0 else carry.remaining > 0
        number = carry.remaining if active is True else jnp.maximum(carry.remaining, 1)
        steps = Steps(
            problem.stepsize_controller,
            final.controller_state,
            final.num_accepted_steps,
            final.tprev,
            problem.state.made_jump,
        )

        def interval(parameters):
            span = rebuild(parameters).span
            t0, t1 = steps.interval(number - 1, span)
            if active is True:
                return t0, t1
            # A step of length zero is safe to evaluate, whatever the vector field.
            return jnp.where(active, t0, span.t0), jnp.where(active, t1, span.t0)

        t_previous, _ = steps.interval(
            jnp.maximum(number - 2, 0), rebuild(parameters).span
        )
        made_jump = steps.made_jump(number - 1)
        return Step(
            number, active, interval, t_previous, *interval(parameters), made_jump
        )

    @staticmethod
    def _savers(problem: Problem, rebuild, cotangent) -> list[Saver]:
        def saver(i, subsaveat, buffers):
            ts = None
            if problem.parameters.ts[i] is not None:
                ts = lambda parameters: rebuild(parameters).ts[i]

            def fn(parameters, t, y):
                parameters = rebuild(parameters)
                return parameters.fns[i](t, y, parameters.args)

            return Saver(ts, subsaveat.steps, fn, (buffers.ts, buffers.ys))

        return [
            saver(i, subsaveat, buffers)
            for i, (subsaveat, buffers) in enumerate(
                zip(problem.subsaveats, save_states(cotangent))
            )
        ]

    @staticmethod
    def _is_linear(problem, rebuild, savers, parameters) -> bool:
        """Whether all that is interpolated is linear in `dense_info`."""
        with_ts = [i for i, saver in enumerate(savers) if saver.ts is not None]
        times = lambda p: (rebuild(p).span, [rebuild(p).ts[i] for i in with_ts])
        return all(
            problem.parameters.fns[i] is save_y for i in with_ts
        ) and not depends(times, parameters)

    @staticmethod
    def _pull_back_times(step, last, cotangent, parameters, total, batch):
        """The times that the loop hands out: of its end, of dense output, of an event."""
        event = cotangent.event_tprev is not None

        def value(_, parameters):
            t0, t1 = step.interval(parameters)
            return (t1, t1, t0, t1) if event else (t1, t1)

        dense = 0.0 if cotangent.dense_ts is None else cotangent.dense_ts[step.number]
        row = [jnp.where(last, cotangent.tprev, 0), jnp.where(step.active, dense, 0)]
        if event:
            row += [
                jnp.where(last, cotangent.event_tprev, 0),
                jnp.where(last, cotangent.event_tnext, 0),
            ]
        row = tuple(jnp.asarray(x, jnp.result_type(step.t0)) for x in row)
        _, total = pull_back(value, (), parameters, row, ((), total), batch)
        return total
