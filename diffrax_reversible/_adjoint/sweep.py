"""The reverse sweep: walks the accepted steps of a solve backwards."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import ArrayLike, Bool, PyTree

from .._compat import save_y, SaveState, while_loop
from .._controller import RecordedSteps, step_interval
from .._solver import as_reversible
from .._types import IntScalarLike
from .abstract_sweep import AbstractSweep, Batch, Inputs
from .hoist import is_subsaveat
from .saves import Cursor, Saver, Step


class Parameters(eqx.Module):
    """What every step depends on and may be differentiated in.

    - `fns`: those of the `SubSaveAt`s.
    """

    args: PyTree
    terms: PyTree
    fns: list[Callable]


class Problem(eqx.Module):
    """The loop of a solve as its adjoint method is handed it.

    - `state`: that of the loop at its start.
    - `options`: the other arguments of `diffrax.AbstractAdjoint.loop`.
    """

    parameters: Parameters
    solver: Any
    stepsize_controller: Any
    saveat: Any
    state: Any
    options: dict[str, Any]

    @property
    def subsaveats(self) -> list:
        return jtu.tree_leaves(self.saveat.subs, is_leaf=is_subsaveat)


def _is_none(x) -> bool:
    return x is None


def _save_states(state) -> list[SaveState]:
    leaves = jtu.tree_leaves(
        state.save_state, is_leaf=lambda x: isinstance(x, SaveState)
    )
    return [x for x in leaves if isinstance(x, SaveState)]


def _differentiated(state) -> tuple:
    """What the loop's state starts with and is differentiated in."""
    ys = [s.ys for s in _save_states(state)]
    return state.y, state.solver_state, state.dense_infos, *ys


def split(problem: Problem) -> tuple[Inputs, PyTree]:
    """The arrays of a problem as inputs of the rule, and what is not an array."""
    state = _differentiated(problem.state)
    nones = jtu.tree_map(lambda _: None, state, is_leaf=lambda x: x is not state)
    rest = eqx.tree_at(
        lambda p: (*_differentiated(p.state), p.parameters),
        problem,
        (*nones, None),
        is_leaf=_is_none,
    )
    state, state_rest = eqx.partition(state, eqx.is_inexact_array)
    parameters, parameters_rest = eqx.partition(
        problem.parameters, eqx.is_inexact_array
    )
    rest, static = eqx.partition((rest, state_rest, parameters_rest), eqx.is_array)
    return Inputs(state, parameters, lax.stop_gradient(rest)), static


def _join(inputs: Inputs, static: PyTree, parameters: PyTree) -> Problem:
    rest, state_rest, parameters_rest = eqx.combine(inputs.rest, static)
    state = eqx.combine(inputs.state, state_rest)
    parameters = eqx.combine(parameters, parameters_rest)
    return eqx.tree_at(
        lambda p: (*_differentiated(p.state), p.parameters),
        rest,
        (*state, parameters),
        is_leaf=_is_none,
    )


class _Walk(eqx.Module):
    remaining: IntScalarLike
    cursors: list[Cursor]
    y: PyTree
    solver_state: PyTree
    cotangent_y: PyTree
    cotangent_solver_state: PyTree


class _LoopDone(Exception):
    """Leaves `loop` before what follows in it is traced a second time."""


class ReversibleSweep(AbstractSweep):
    """The loop of a solve and its reverse: every step is undone, and pulled back at the
    state that was found.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    """

    refusal = (
        "`adjoint=ReversibleAdjoint()` does not differentiate with respect to a value "
        "that a callable closes over, other than the vector field and "
        "`SaveAt(fn=...)`. Pass it through `args`, or make the callable an "
        "`equinox.Module` of which it is a field; or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )

    def __init__(self, loop: Callable, static: PyTree):
        self.loop = loop
        self.static = static

    def evaluate(self, inputs: Inputs) -> PyTree:
        problem = _join(inputs, self.static, inputs.parameters)
        parameters, controller = problem.parameters, problem.stepsize_controller
        fns = iter(parameters.fns)

        def restore(subsaveat):
            # What is saved at `t0` is in the buffers already.
            where = lambda s: (s.t0, s.fn)
            return eqx.tree_at(where, subsaveat, (False, next(fns)), is_leaf=_is_none)

        subs = jtu.tree_map(restore, problem.saveat.subs, is_leaf=is_subsaveat)
        saveat = eqx.tree_at(lambda s: s.subs, problem.saveat, subs, is_leaf=_is_none)
        done = []

        def outer_while_loop(cond_fun, body_fun, init_state, *, max_steps, buffers):
            del init_state
            state = jtu.tree_map(jnp.asarray, problem.state)

            def with_record(state):
                if not isinstance(controller, RecordedSteps):
                    return buffers(state)
                return [*buffers(state), state.controller_state.record.intervals]

            done.append(
                while_loop(
                    cond_fun,
                    body_fun,
                    state,
                    max_steps=max_steps,
                    buffers=with_record,
                    kind="lax",
                )
            )
            raise _LoopDone

        try:
            self.loop(
                args=parameters.args,
                terms=parameters.terms,
                solver=problem.solver,
                stepsize_controller=controller,
                saveat=saveat,
                init_state=problem.state,
                inner_while_loop=ft.partial(while_loop, kind="lax"),
                outer_while_loop=outer_while_loop,
                **problem.options,
            )
        except _LoopDone:
            pass
        return jtu.tree_map(jnp.asarray, done[0])

    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> _Walk:
        problem = _join(inputs, self.static, inputs.parameters)
        cursors = [
            Cursor(s.save_index, s.saveat_ts_index) for s in _save_states(outputs)
        ]
        return _Walk(
            outputs.num_accepted_steps,
            cursors,
            *as_reversible(problem.solver).depart(
                problem.parameters.terms,
                outputs.tprev,
                outputs.y,
                outputs.solver_state,
            ),
            cotangents.y,
            cotangents.solver_state,
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
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, cotangent_parameters, inputs.parameters, is_leaf=_is_none
        )
        problem = _join(inputs, self.static, inputs.parameters)
        rebuild = lambda parameters: eqx.combine(parameters, problem.parameters)
        solver = as_reversible(problem.solver)

        def rebuild_terms(parameters):
            parameters = rebuild(parameters)
            return parameters.terms, parameters.args

        step = self._current_step(problem, outputs, carry, batch)
        y, solver_state = solver.arrive(
            rebuild_terms, parameters, step.t1, carry.y, carry.solver_state
        )
        cotangent_y, cotangent_solver_state = self._where(
            step.active, (carry.cotangent_y, carry.cotangent_solver_state), 0
        )
        savers = [
            Saver(
                subsaveat.ts,
                subsaveat.steps,
                lambda p, t, y, i=i: rebuild(p).fns[i](t, y, rebuild(p).args),
                problem.parameters.fns[i] is save_y,
                save_state.ys,
            )
            for i, (subsaveat, save_state) in enumerate(
                zip(problem.subsaveats, _save_states(cotangents))
            )
        ]
        cursors = list(carry.cursors)

        total = (cotangent_y, cotangent_parameters)
        for i, saver in enumerate(savers):
            if saver.steps != 0:
                total, cursors[i] = saver.pull_back_end(
                    step, cursors[i], y, parameters, total, batch
                )
        cotangent_y, cotangent_parameters = total

        ts_state, made_jump = (step.t_previous,), False

        def backward_step():
            args, terms = problem.parameters.args, problem.parameters.terms
            _, dense_info, _, _ = solver.backward_step(
                terms, step.t0, step.t1, y, args, ts_state, solver_state, made_jump
            )
            return dense_info

        cotangent_dense_info = None
        with_ts = [i for i, saver in enumerate(savers) if saver.ts is not None]
        if problem.saveat.dense or len(with_ts) > 0:
            dense_info = jtu.tree_map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                eqx.filter_eval_shape(backward_step),
            )
            cotangent_dense_info = dense_info
            if problem.saveat.dense:
                cotangent_dense_info = self._where(
                    step.active,
                    jtu.tree_map(lambda x: x[step.number - 1], cotangents.dense_infos),
                    0,
                )
            if not all(savers[i].saves_y for i in with_ts):
                # Where the saved value is not linear in the interpolated one, that must
                # be known: at the cost of one more `backward_step`.
                pending = [savers[i].has_pending(step, cursors[i]) for i in with_ts]
                dense_info = lax.cond(
                    batch.any(ft.reduce(jnp.logical_or, pending)),
                    backward_step,
                    lambda: dense_info,
                )

            def interpolate(dense_info, t):
                interpolation = problem.solver.interpolation_cls(
                    t0=step.t0, t1=step.t1, **dense_info
                )
                return interpolation.evaluate(t)

            total = (cotangent_dense_info, cotangent_parameters)
            for i in with_ts:
                total, cursors[i] = savers[i].pull_back_ts(
                    step, cursors[i], interpolate, dense_info, parameters, total, batch
                )
            cotangent_dense_info, cotangent_parameters = total

        *new, cotangent_parameters = solver.pull_back_step(
            rebuild_terms,
            parameters,
            step.t0,
            step.t1,
            y,
            ts_state,
            solver_state,
            made_jump,
            cotangent_y,
            cotangent_solver_state,
            cotangent_dense_info,
            batch.accumulate,
            cotangent_parameters,
        )
        new = _Walk(carry.remaining - 1, cursors, *new)
        return self._where(step.active, new, carry), cotangent_parameters

    def finish(self, cotangents: PyTree, carry: _Walk) -> PyTree:
        _, _, *buffers = _differentiated(cotangents)
        return carry.cotangent_y, carry.cotangent_solver_state, *buffers

    @staticmethod
    def _current_step(problem, outputs, carry, batch) -> Step:
        # Outside a batch the loop ends when there is nothing left to walk.
        active = True if len(batch.names) == 0 else carry.remaining > 0
        number = carry.remaining if active is True else jnp.maximum(carry.remaining, 1)
        interval = lambda index: step_interval(
            problem.stepsize_controller,
            outputs.controller_state,
            index,
            outputs.num_accepted_steps,
            problem.options["t0"],
            outputs.tprev,
            problem.options["dt0"],
        )
        t0, t1 = interval(number - 1)
        t_previous, _ = interval(jnp.maximum(number - 2, 0))
        # A step of length zero is safe to evaluate, whatever the vector field.
        return Step(number, active, t_previous, t0, jnp.where(active, t1, t0))

    @staticmethod
    def _where(active, x, y):
        if active is True:
            return x
        if isinstance(y, int):
            return jtu.tree_map(lambda a: jnp.where(active, a, y), x)
        return jtu.tree_map(lambda a, b: jnp.where(active, a, b), x, y)
