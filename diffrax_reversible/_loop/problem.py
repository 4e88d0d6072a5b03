"""A solve as a function of arrays."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import ConstantStepSize
from jaxtyping import PyTree

from .._autodiff.sweep import Inputs
from .._compat import SaveState, while_loop
from .._controller.recorded import RecordedSteps
from .closures import is_subsaveat
from .moving_steps import follow, moving_node, MovingSteps
from .steps import Span


class Parameters(eqx.Module):
    """What every step depends on and may be differentiated in.

    - `fns`, `ts`: those of the `SubSaveAt`s.
    - `span`: `t0`, `t1` and `dt0`.
    """

    args: PyTree
    terms: PyTree
    fns: list[Callable]
    ts: list
    span: Span


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


def is_none(x) -> bool:
    return x is None


def save_states(state) -> list[SaveState]:
    """The state of the buffers of each `SubSaveAt`."""
    leaves = jtu.tree_leaves(
        state.save_state, is_leaf=lambda x: isinstance(x, SaveState)
    )
    return [x for x in leaves if isinstance(x, SaveState)]


def differentiated(state) -> tuple:
    """What the loop's state starts with and is differentiated in."""
    saves = save_states(state)
    buffers = [s.ys for s in saves] + [s.ts for s in saves]
    return state.y, state.solver_state, state.dense_infos, state.dense_ts, *buffers


def split(problem: Problem) -> tuple[Inputs, PyTree]:
    """The arrays of a problem as inputs of the rule, and what is not an array."""
    state = differentiated(problem.state)
    rest = eqx.tree_at(
        lambda p: (*differentiated(p.state), p.parameters),
        problem,
        (None,) * (len(state) + 1),
        is_leaf=is_none,
    )
    state, state_rest = eqx.partition(state, eqx.is_inexact_array)
    parameters, parameters_rest = eqx.partition(
        problem.parameters, eqx.is_inexact_array
    )
    rest, static = eqx.partition((rest, state_rest, parameters_rest), eqx.is_array)
    # Functions may close over arrays of NumPy.
    state, parameters = jtu.tree_map(jnp.asarray, (state, parameters))
    return Inputs(state, parameters, lax.stop_gradient(rest)), static


def join(inputs: Inputs, static: PyTree) -> Problem:
    """The inverse of `split`."""
    rest, state_rest, parameters_rest = eqx.combine(inputs.rest, static)
    state = eqx.combine(inputs.state, state_rest)
    parameters = eqx.combine(inputs.parameters, parameters_rest)
    return eqx.tree_at(
        lambda p: (*differentiated(p.state), p.parameters),
        rest,
        (*state, parameters),
        is_leaf=is_none,
    )


class _LoopDone(Exception):
    """Leaves `loop` before what follows in it is traced a second time."""


def _moving(problem: Problem):
    """The controller and the initial state, differentiable in the span of the solve."""
    controller, state = problem.stepsize_controller, problem.state
    span = problem.parameters.span
    where = lambda s: (s.tprev, s.tnext)
    if isinstance(controller, ConstantStepSize):
        assert span.dt0 is not None
        tnext = jnp.minimum(span.t0 + span.dt0, span.t1)
        count, num_steps, t0, t1_or_dt0 = state.controller_state
        leader = jnp.where(jnp.isfinite(span.t1), span.t1, span.dt0)
        bounds = follow(t0, span.t0), follow(t1_or_dt0, leader)
        state = eqx.tree_at(
            lambda s: s.controller_state, state, (count, num_steps, *bounds)
        )
        nodes = follow(state.tprev, span.t0), follow(state.tnext, tnext)
    else:
        controller = MovingSteps(controller, span.t0, span.t1)
        nodes = [moving_node(t, span.t0, span.t1) for t in where(state)]
    return controller, eqx.tree_at(where, state, nodes)


def run(
    loop: Callable, problem: Problem, memory: Any, keep: Callable[[Any, Any, Any], Any]
) -> tuple[PyTree, Any]:
    """The state at the end of the loop, and what was kept on the way.

    - `loop`: diffrax's own.
    - `memory`: has a property `buffers`; or `None`.
    - `keep`: makes the new memory of the old one and of the states before and after a
        step of the loop.
    """
    parameters = problem.parameters
    span = parameters.span
    recorded = isinstance(problem.stepsize_controller, RecordedSteps)
    controller, init_state = _moving(problem)
    fns, ts = iter(parameters.fns), iter(parameters.ts)

    def restore(subsaveat):
        # What is saved at `t0` is in the buffers already.
        values = (False, next(fns), next(ts))
        where = lambda s: (s.t0, s.fn, s.ts)
        return eqx.tree_at(where, subsaveat, values, is_leaf=is_none)

    subs = jtu.tree_map(restore, problem.saveat.subs, is_leaf=is_subsaveat)
    saveat = eqx.tree_at(lambda s: s.subs, problem.saveat, subs, is_leaf=is_none)
    done = []

    def outer_while_loop(cond_fun, body_fun, _, *, max_steps, buffers):
        def body(carry):
            state, memory = carry
            new = body_fun(state)
            return new, None if memory is None else keep(memory, state, new)

        def all_buffers(carry):
            state, memory = carry
            nodes = list(buffers(state))
            if recorded:
                record = state.controller_state.record
                nodes += [record.intervals, record.made_jump]
            if memory is not None:
                nodes += memory.buffers
            return nodes

        state = jtu.tree_map(jnp.asarray, init_state)
        done.append(
            while_loop(
                lambda carry: cond_fun(carry[0]),
                body,
                (state, memory),
                max_steps=max_steps,
                buffers=all_buffers,
                kind="lax",
            )
        )
        raise _LoopDone

    try:
        loop(
            args=parameters.args,
            terms=parameters.terms,
            solver=problem.solver,
            stepsize_controller=controller,
            saveat=saveat,
            init_state=init_state,
            inner_while_loop=ft.partial(while_loop, kind="lax"),
            outer_while_loop=outer_while_loop,
            t0=span.t0,
            t1=span.t1,
            dt0=span.dt0,
            **problem.options,
        )
    except _LoopDone:
        pass
    return jtu.tree_map(jnp.asarray, done[0])
