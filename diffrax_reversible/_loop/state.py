"""The fields of diffrax's private state of a solve: known here, and nowhere else."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import ConstantStepSize, is_okay, is_successful, RESULTS, Solution
from jaxtyping import PyTree

from .._compat import SaveState
from .._controller.recorded import may_jump as controller_may_jump
from .._tree import where
from .._types import BoolScalarLike, DenseInfo, IntScalarLike, RealScalarLike
from .moving_steps import follow, moving_node


def is_none(x) -> bool:
    return x is None


class Span(eqx.Module):
    """The arguments of `diffeqsolve` that place the steps."""

    t0: RealScalarLike
    t1: RealScalarLike
    dt0: RealScalarLike | None


def save_states(state) -> list[SaveState]:
    """The state of the buffers of each `SubSaveAt`."""
    leaves = jtu.tree_leaves(
        state.save_state, is_leaf=lambda x: isinstance(x, SaveState)
    )
    return [x for x in leaves if isinstance(x, SaveState)]


def saved(state) -> list[tuple[IntScalarLike, IntScalarLike]]:
    """For each `SubSaveAt` the number of entries in its buffer, and of its `ts` among
    them."""
    return [(s.save_index, s.saveat_ts_index) for s in save_states(state)]


def buffers(state) -> list[tuple[Any, PyTree]]:
    """For each `SubSaveAt` its buffers of times and of values."""
    return [(s.ts, s.ys) for s in save_states(state)]


def differentiated(state) -> tuple:
    """What the state starts with and is differentiated in: the solution and the solver
    state first."""
    saves = buffers(state)
    return state.y, state.solver_state, state.dense_infos, state.dense_ts, saves


def with_differentiated(state, values: tuple):
    """The state with other values of `differentiated`."""

    def leaves(state):
        saves = save_states(state)
        flat = [x for s in saves for x in (s.ts, s.ys)]
        return state.y, state.solver_state, state.dense_infos, state.dense_ts, *flat

    *first, saves = values
    flat = (*first, *[x for pair in saves for x in pair])
    return eqx.tree_at(leaves, state, flat, is_leaf=is_none)


def with_solver_state(state, solver_state: PyTree):
    return eqx.tree_at(lambda s: s.solver_state, state, solver_state, is_leaf=is_none)


def with_save_state(state, save_state: PyTree):
    return eqx.tree_at(lambda s: s.save_state, state, save_state, is_leaf=is_none)


def save_state(state) -> PyTree:
    return state.save_state


def controller_state(state) -> PyTree:
    return state.controller_state


def succeeded(state) -> BoolScalarLike:
    return is_successful(state.result)


def solver_failed(state) -> BoolScalarLike:
    """Whether an accepted step is wrong: the root finder of its solver has failed."""
    fine = (
        RESULTS.successful,
        RESULTS.event_occurred,
        RESULTS.max_steps_reached,
        RESULTS.max_steps_rejected,
        RESULTS.dt_min_reached,
    )
    okay = [state.result == x for x in fine]
    return jnp.logical_not(jnp.any(jnp.stack(list(map(jnp.asarray, okay)))))


def reached_max_steps(state) -> BoolScalarLike:
    return state.result == RESULTS.max_steps_reached


_Result: Any = type(RESULTS.successful)


class _RaisedResult(_Result):
    """The result of a solve whose error has been raised, if it was one. Where diffrax
    would raise it, an ordinary one takes its place."""

    def error_if(self, token, pred):
        ordinary = _with_type(_Result, self)
        if isinstance(token, Solution):
            return eqx.tree_at(lambda s: s.result, token, ordinary)
        return ordinary.error_if(token, pred)


def _with_type(kind: Any, result: Any) -> Any:
    return kind(*[getattr(result, f.name) for f in dataclasses.fields(result)])


def raised(outputs):
    """What `AbstractAdjoint.loop` returns, raising the error that diffrax would raise
    afterwards."""
    state, stats = outputs
    state = state.result.error_if(state, jnp.logical_not(is_okay(state.result)))
    result = _with_type(_RaisedResult, state.result)
    return eqx.tree_at(lambda s: s.result, state, result), stats


def at(state, t0: RealScalarLike, y0: PyTree):
    """The state with another start."""
    return eqx.tree_at(lambda s: (s.tprev, s.y), state, (t0, y0), is_leaf=is_none)


def without_jump(state):
    """The state, as if the vector field did not jump before the first step."""
    return eqx.tree_at(lambda s: s.made_jump, state, False)


def next_step(state) -> tuple[RealScalarLike, RealScalarLike, BoolScalarLike]:
    """The start and the end of the step that is tried next, and whether the vector field
    jumped just before it."""
    return state.tprev, state.tnext, state.made_jump


def num_accepted(state) -> IntScalarLike:
    return state.num_accepted_steps


def end_time(state) -> RealScalarLike:
    """The end of the last accepted step, which diffrax may have moved by a few units in
    the last place."""
    return state.tprev


def may_jump(controller, solver, terms, args, state) -> bool:
    """Whether the vector field is ever said to jump."""
    error_order = solver.error_order(terms)
    where = (state.tprev, state.tnext, state.y, args, error_order)
    jumps = controller_may_jump(controller, *where, state.controller_state)
    return jumps or state.made_jump is not False


def resumable(state, solver_state: PyTree):
    """What of a state it takes to go on from it, where nothing is saved."""
    nothing = dict.fromkeys(
        (
            "dense_ts",
            "dense_infos",
            "dense_save_index",
            "progress_meter_state",
            "event_tprev",
            "event_tnext",
            "event_dense_info",
            "event_values",
            "event_mask",
        )
    )
    return dataclasses.replace(
        state, save_state=[], solver_state=solver_state, **nothing
    )


def moving(controller, state, span: Span):
    """The initial state, differentiable in the span of the solve."""
    if not isinstance(controller, ConstantStepSize):
        return moved(controller, state, span)
    assert span.dt0 is not None
    count, num_steps, *bounds = constant_steps(state.controller_state)
    new_state = (count, num_steps, *follow_span(bounds, span))
    tprev = follow(state.tprev, span.t0)
    tnext = follow(state.tnext, jnp.minimum(span.t0 + span.dt0, span.t1))
    where = lambda s: (s.controller_state, s.tprev, s.tnext)
    return eqx.tree_at(where, state, (new_state, tprev, tnext))


def moved(controller, state, span: Span):
    """The state after a step. The next step is differentiated as if it kept its place
    relative to `t0` and `t1`, and not in how it was chosen; constant steps as they are."""
    if isinstance(controller, ConstantStepSize):
        return state
    nodes = [moving_node(t, span.t0, span.t1) for t in (state.tprev, state.tnext)]
    arrays, rest = eqx.partition(state.controller_state, eqx.is_array)
    stopped = eqx.combine(lax.stop_gradient(arrays), rest)
    where = lambda s: (s.tprev, s.tnext, s.controller_state)
    return eqx.tree_at(where, state, (*nodes, stopped), is_leaf=is_none)


def constant_steps(state) -> tuple:
    """The state of `ConstantStepSize`: the number of steps that are completed, and of
    all steps; their start; their end or, if this is infinite, their length."""
    completed, num_steps, t0, t1_or_dt0 = state
    return completed, num_steps, t0, t1_or_dt0


def follow_span(bounds, span: Span):
    """The last two of `constant_steps`, differentiated as the span of the solve is."""
    t0, t1_or_dt0 = bounds
    assert span.dt0 is not None
    leader = jnp.where(jnp.isfinite(span.t1), span.t1, span.dt0)
    return follow(t0, span.t0), follow(t1_or_dt0, leader)


def times_of(state, t0: RealScalarLike, t1: RealScalarLike) -> tuple:
    """What the last step, from `t0` to `t1`, writes of times into the state, and what
    every step does. See `cotangents_of_times`."""
    has_event, has_dense = state.event_tprev is not None, state.dense_ts is not None
    return (t1, t0, t1) if has_event else (t1,), (t1,) if has_dense else ()


def cotangents_of_times(
    cotangent, number: IntScalarLike, active: BoolScalarLike, is_last: BoolScalarLike
) -> tuple:
    """The cotangents of `times_of` step `number`."""
    last = (cotangent.tprev,)
    if cotangent.event_tprev is not None:
        last += (cotangent.event_tprev, cotangent.event_tnext)
    every = ()
    if cotangent.dense_ts is not None:
        every = (cotangent.dense_ts[number],)
    return _where(is_last, last), _where(active, every)


def cotangent_of_dense_info(
    cotangent, number: IntScalarLike, active: BoolScalarLike, is_last: BoolScalarLike
) -> DenseInfo | None:
    """The cotangent of the dense output of step `number`, from dense output that was
    asked for and from locating an event; `None` if there is neither."""
    total = None
    if cotangent.dense_infos is not None:
        row = jtu.tree_map(lambda x: x[number - 1], cotangent.dense_infos)
        total = _where(active, row)
    if cotangent.event_dense_info is not None:
        row = _where(is_last, cotangent.event_dense_info)
        total = row if total is None else jtu.tree_map(jnp.add, total, row)
    return total


def _where(pred, x):
    return where(pred, x, 0)
