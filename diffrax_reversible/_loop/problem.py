"""diffrax's loop as a pure function of arrays."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import NoProgressMeter, SaveAt
from jaxtyping import PyTree

from .._autodiff.sweep import Inputs
from .._compat import while_loop, WrapTerm
from .._controller import RecordedSteps
from .._types import BoolScalarLike
from .closures import subsaveats_of
from .state import (
    controller_state,
    differentiated,
    is_none,
    moved,
    moving,
    resumable,
    Span,
    with_differentiated,
)


class Parameters(eqx.Module):
    """What every step depends on and may be differentiated in.

    - `span`: `t0`, `t1` and `dt0`.
    """

    args: PyTree
    terms: PyTree
    solver: Any
    saveat: Any
    span: Span

    @property
    def subsaveats(self) -> list:
        return subsaveats_of(self.saveat)


class Problem(eqx.Module):
    """The loop of a solve as its adjoint method is handed it.

    - `state`: that of the loop at its start.
    - `options`: the other arguments of `diffrax.AbstractAdjoint.loop`.
    """

    parameters: Parameters
    stepsize_controller: Any
    state: Any
    options: dict[str, Any]


def split(problem: Problem) -> tuple[Inputs, PyTree]:
    """The arrays of a problem as inputs of the differentiation rule, and what is not an
    array."""
    state = differentiated(problem.state)
    no_values = (*[None] * 4, [(None, None)] * len(state[-1]))
    rest = eqx.tree_at(
        lambda p: (p.state, p.parameters),
        problem,
        (with_differentiated(problem.state, no_values), None),
        is_leaf=is_none,
    )
    return Inputs.split(state, problem.parameters, rest)


def join(inputs: Inputs, static: PyTree) -> Problem:
    """The inverse of `split`."""
    state, parameters, rest = inputs.join(static)
    is_wrapped = lambda x: isinstance(x, WrapTerm)
    parameters = jtu.tree_map(_with_direction, parameters, is_leaf=is_wrapped)
    return eqx.tree_at(
        lambda p: (p.state, p.parameters),
        rest,
        (with_differentiated(rest.state, state), parameters),
        is_leaf=is_none,
    )


def direction_of(problem: Problem) -> Any:
    """1, or -1 if `t1 < t0`: times are those of the user times this."""
    terms = problem.parameters.terms
    wrapped = jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, WrapTerm))
    return next(x.direction for x in wrapped if isinstance(x, WrapTerm))


def _with_direction(x: Any) -> Any:
    """A term whose direction is weakly typed, as that of diffrax is; it does not stay so
    in a residual."""
    if not isinstance(x, WrapTerm):
        return x
    return WrapTerm(x.term, jnp.where(x.direction > 0, 1, -1))


def run(
    loop: Callable,
    problem: Problem,
    memory: Any,
    keep: Callable[[Any, Any, Any], Any],
) -> tuple[Any, Any]:
    """The state at the end of the loop, and the memory of what was kept on the way.

    - `loop`: diffrax's own.
    - `memory`: at the start; has a property `buffers`.
    - `keep`: makes the new memory of the old one and of the states before and after a
        step of the loop.
    """
    parameters, options = problem.parameters, dict(problem.options)
    controller, span = problem.stepsize_controller, parameters.span
    init_state = moving(controller, problem.state, span)
    # What is saved at `t0` is in the buffers already. `t1` is saved afterwards.
    ends = lambda s: [x for sub in subsaveats_of(s) for x in (sub.t0, sub.t1)]
    saveat = eqx.tree_at(ends, parameters.saveat, replace_fn=lambda _: False)
    if options["event"] is not None:
        # Events are located afterwards, too.
        options["event"] = eqx.tree_at(
            lambda e: e.root_finder, options["event"], None, is_leaf=is_none
        )
    found = []

    def outer_while_loop(cond_fun, body_fun, _, *, max_steps, buffers):
        def body(carry):
            state, memory = carry
            new = moved(controller, body_fun(state), span)
            return new, keep(memory, state, new)

        def all_buffers(carry):
            state, memory = carry
            nodes = [*buffers(state), *memory.buffers]
            if isinstance(controller, RecordedSteps):
                record = controller_state(state).record
                nodes += [record.intervals, record.made_jump]
            return nodes

        carry = jtu.tree_map(jnp.asarray, (init_state, memory))
        final = while_loop(
            lambda carry: cond_fun(carry[0]),
            body,
            carry,
            max_steps=max_steps,
            buffers=all_buffers,
            kind="lax",
        )
        found.append(final)
        return final[0]

    _call(loop, problem, saveat, init_state, outer_while_loop, options)
    return jtu.tree_map(jnp.asarray, found[0])


def run_again(
    loop: Callable,
    problem: Problem,
    start: Any,
    memory: Any,
    keep: Callable[[Any, Any, Any], Any],
    go_on: Callable[[Any], BoolScalarLike],
) -> Any:
    """The memory of what was kept on the way of a part of the loop. Nothing is saved.

    - `start`: the state at the start of it, as `resumable` makes it.
    - `keep`: as for `run`.
    - `go_on`: whether to make another step from a state.
    """
    _, solver_state, *_ = differentiated(problem.state)
    found = []

    def outer_while_loop(cond_fun, body_fun, _, *, max_steps, buffers):
        del max_steps, buffers

        def body(carry):
            state, memory = carry
            new = body_fun(state)
            return new, keep(memory, state, new)

        _, memory_at_end = while_loop(
            lambda carry: cond_fun(carry[0]) & go_on(carry[0]),
            body,
            jtu.tree_map(jnp.asarray, (start, memory)),
            max_steps=None,
            buffers=lambda carry: carry[1].buffers,
            kind="lax",
        )
        found.append(memory_at_end)
        # Whether it has failed is known already.
        return init_state

    init_state = resumable(problem.state, solver_state)
    options = problem.options | dict(event=None, progress_meter=NoProgressMeter())
    _call(loop, problem, SaveAt(subs=[]), init_state, outer_while_loop, options)
    return found[0]


def _call(
    loop: Callable,
    problem: Problem,
    saveat: SaveAt,
    init_state: Any,
    outer_while_loop: Callable,
    options: dict[str, Any],
) -> None:
    """Calls diffrax's loop for what it hands to `outer_while_loop`: what it does
    afterwards is done outside, and is dropped here."""
    parameters, span = problem.parameters, problem.parameters.span
    loop(
        args=parameters.args,
        terms=parameters.terms,
        solver=parameters.solver,
        stepsize_controller=problem.stepsize_controller,
        saveat=saveat,
        init_state=init_state,
        inner_while_loop=ft.partial(while_loop, kind="lax"),
        outer_while_loop=outer_while_loop,
        t0=span.t0,
        t1=span.t1,
        dt0=span.dt0,
        **options,
    )
