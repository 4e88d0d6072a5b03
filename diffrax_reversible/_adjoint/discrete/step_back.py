"""One step of the reverse sweep."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._autodiff.sweep import Batch
from ..._compat import depends, save_y
from ..._loop.problem import Parameters, Problem, save_states
from ..._solver.updates.solver import AbstractReversibleSolver
from ..._tree import zeros_of
from ..._types import BoolScalarLike, DenseInfo, RealScalarLike, Y
from .saves import Cursor, pull_back, Saver, Step


def where(pred: BoolScalarLike, x: PyTree, y: PyTree) -> PyTree:
    """`jnp.where` of pytrees; `x` if `pred` is not traced, since it is true then."""
    if pred is True:
        return x
    if isinstance(y, int):
        return jtu.tree_map(lambda a: jnp.where(pred, a, y), x)
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


@dataclasses.dataclass(frozen=True)
class StepBack:
    """Pulls back, in the reverse order, what a step of the loop has done: saved its
    end, saved its inside, stepped.

    - `reversal`: of the solver.
    - `rebuild`: makes all `Parameters` of those that are differentiated.
    - `parameters`: those that are.
    - `final`, `cotangent`: the loop's last state, and its cotangent.
    - `carried`: what the sweep carries, at the end of the step.
    """

    problem: Problem
    reversal: Any
    rebuild: Callable[[PyTree], Parameters]
    parameters: PyTree
    step: Step
    final: Any
    cotangent: Any
    carried: tuple[PyTree, PyTree]
    batch: Batch

    def rebuild_step(self, parameters: PyTree) -> tuple:
        """`terms`, `args`, and the start and the end of the step."""
        everything = self.rebuild(parameters)
        return everything.terms, everything.args, *self.step.interval(parameters)

    @ft.cached_property
    def arrived(self) -> tuple[Y, PyTree]:
        """The solution and the solver state at the end of the step, of what the sweep
        carries there."""
        return self.reversal.arrive(self.rebuild_step, self.parameters, *self.carried)

    @property
    def last(self) -> BoolScalarLike:
        """Whether this is the last step of the solve."""
        return self.step.active & (self.step.number == self.final.num_accepted_steps)

    @ft.cached_property
    def savers(self) -> list[Saver]:
        def saver(i, subsaveat, buffers):
            ts = None
            if self.problem.parameters.ts[i] is not None:
                ts = lambda parameters: self.rebuild(parameters).ts[i]

            def fn(parameters, t, y):
                parameters = self.rebuild(parameters)
                return parameters.fns[i](t, y, parameters.args)

            return Saver(ts, subsaveat.steps, fn, (buffers.ts, buffers.ys))

        pairs = zip(self.problem.subsaveats, save_states(self.cotangent))
        return [saver(i, *pair) for i, pair in enumerate(pairs)]

    @property
    def _from_start(self) -> bool:
        """Whether the inside of the step is a function of its start."""
        solver = self.problem.solver
        return (
            isinstance(solver, AbstractReversibleSolver)
            and solver.interpolates_from_start
        )

    @property
    def _with_ts(self) -> list[int]:
        """Which of the savers save inside of steps."""
        return [i for i, saver in enumerate(self.savers) if saver.ts is not None]

    def end(self, total, cursors: list[Cursor]):
        """Adds what the end of the step was used for to `total`: the cotangents of `y`
        and of the parameters."""
        cursors, (y, _) = list(cursors), self.arrived
        for i, saver in enumerate(self.savers):
            if saver.steps != 0:
                total, cursors[i] = saver.pull_back_end(
                    self.step, cursors[i], y, self.parameters, total, self.batch
                )
        return self._times(total), cursors

    def _times(self, total):
        """The times that the loop hands out: its end, of dense output, of an event."""
        cotangent, step = self.cotangent, self.step
        event = cotangent.event_tprev is not None
        dense = cotangent.dense_ts is not None

        def value(_, parameters):
            t0, t1 = step.interval(parameters)
            return (t1, t1, t0, t1) if event else (t1, t1)

        row = [
            jnp.where(self.last, cotangent.tprev, 0),
            jnp.where(step.active, cotangent.dense_ts[step.number] if dense else 0, 0),
        ]
        if event:
            row += [
                jnp.where(self.last, cotangent.event_tprev, 0),
                jnp.where(self.last, cotangent.event_tnext, 0),
            ]
        row = tuple(jnp.asarray(x, jnp.result_type(step.t0)) for x in row)
        y, _ = self.arrived
        return pull_back(value, y, self.parameters, row, total, self.batch)

    def inside(self, cotangent_parameters, cursors: list[Cursor]):
        """The cotangent of `dense_info`, from what the inside of the step was used for
        (`None` if it never is), and what that adds to the parameters."""
        has_event = self.problem.options["event"] is not None
        with_ts = [] if self._from_start else self._with_ts
        if not (self.problem.saveat.dense or has_event or with_ts):
            return None, cotangent_parameters, cursors
        step, cursors = self.step, list(cursors)
        cotangent = dense_info = zeros_of(self._backward_step)
        if self.problem.saveat.dense:
            infos = self.cotangent.dense_infos
            row = jtu.tree_map(lambda x: x[step.number - 1], infos)
            cotangent = where(step.active, row, 0)
        if has_event:
            cotangent = jtu.tree_map(
                lambda total, x: total + jnp.where(self.last, x, 0),
                cotangent,
                self.cotangent.event_dense_info,
            )
        if len(with_ts) > 0 and not self._is_linear:
            # What is saved is not linear in `dense_info`, so that this must be known:
            # at the cost of one more `backward_step`.
            pending = [
                self.savers[i].has_pending(step, cursors[i], self.parameters)
                for i in with_ts
            ]
            dense_info = lax.cond(
                self.batch.any(ft.reduce(jnp.logical_or, pending)),
                self._backward_step,
                lambda: dense_info,
            )
        total = (cotangent, cotangent_parameters)
        for i in with_ts:
            total, cursors[i] = self.savers[i].pull_back_ts(
                step,
                cursors[i],
                self._interpolate,
                dense_info,
                self.parameters,
                total,
                self.batch,
            )
        return *total, cursors

    def _backward_step(self) -> DenseInfo:
        y, solver_state = self.arrived
        terms, args, t0, t1 = self.rebuild_step(self.parameters)
        ts_state = (self.step.t_previous,)
        _, dense_info, _, _ = self.reversal.backward_step(
            terms, t0, t1, y, args, ts_state, solver_state, self.step.made_jump
        )
        return dense_info

    def _interpolate(self, parameters, dense_info: DenseInfo, t: RealScalarLike) -> Y:
        t0, t1 = self.step.interval(parameters)
        interpolation_cls = self.problem.solver.interpolation_cls
        return interpolation_cls(t0=t0, t1=t1, **dense_info).evaluate(t)

    @property
    def _is_linear(self) -> bool:
        """Whether all that is interpolated is linear in `dense_info`."""
        fns, rebuild = self.problem.parameters.fns, self.rebuild
        times = lambda p: (rebuild(p).span, [rebuild(p).ts[i] for i in self._with_ts])
        saves_y = all(fns[i] is save_y for i in self._with_ts)
        return saves_y and not depends(times, self.parameters)

    def itself(
        self,
        cotangent_y,
        cotangent_solver_state,
        cotangent_dense_info,
        cotangent_parameters,
    ):
        """Undoes the step and pulls it back: what the sweep carries at its start, the
        cotangents of `y` and of the solver state there, and that of the parameters."""
        y, solver_state = self.arrived
        return self.reversal.pull_back_step(
            self.rebuild_step,
            self.parameters,
            y,
            (self.step.t_previous,),
            solver_state,
            self.step.made_jump,
            cotangent_y,
            cotangent_solver_state,
            cotangent_dense_info,
            self.batch,
            cotangent_parameters,
        )

    def start(self, carried, total, cursors: list[Cursor]):
        """Adds what was saved by a step of its own from the start of this one to
        `total`: the cotangents of `(y, solver_state)` there and of the parameters."""
        if not self._from_start:
            return total, cursors
        cursors = list(cursors)

        def side_step(parameters, start, t):
            terms, args, t0, _ = self.rebuild_step(parameters)
            y0, solver_state = start
            return self.problem.solver.side_step(
                terms, args, t0, t, y0, solver_state, self.step.made_jump
            )

        for i in self._with_ts:
            total, cursors[i] = self.savers[i].pull_back_ts(
                self.step,
                cursors[i],
                side_step,
                carried,
                self.parameters,
                total,
                self.batch,
            )
        return total, cursors
