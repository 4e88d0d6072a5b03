"""Undoing a solve."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractAdjoint,
    AbstractProgressMeter,
    AbstractSolver,
    AbstractStepSizeController,
    AbstractTerm,
    ConstantStepSize,
    diffeqsolve,
    NoProgressMeter,
    SaveAt,
    Solution,
    SubSaveAt,
)
from jaxtyping import Array, PyTree

from .._adjoint import ReversibleAdjoint
from .._adjoint.reversible.accuracy import default_rtol, is_solution
from .._adjoint.reversible.sweep import refuse_restarts_inside
from .._autodiff.report import Action, check_action, is_trusted, OnFailure
from .._call_site import call_site
from .._compat import nondifferentiable
from .._loop.state import Span
from .._loop.steps import UndoneSteps
from .._solver.updates.restart import copy_of, RestartState
from .._tree import norm
from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .finished import (
    check_solver_state,
    is_end_of_a_step,
    refuse,
    refuse_lost_restarts,
    state_like,
    steps_of,
)
from .solver import from_bits, in_direction, Undone, UndoneState


_LOST = (
    "`{name}` has not found the start of the solve{element}: the {what} that it found "
    "differs from that which it should have found by a relative {loss:.1e}, which is more "
    "than {rtol:.1e}. Either `terms`, `args`, `solver` or the steps are not those of the "
    "solve; or the solve was given a `solver_state` at its start, which cannot be "
    "checked (pass `reversal_rtol=math.inf`); or rounding was amplified too much on the "
    "way, since the flow contracts, or since the solver damps "
    "(`Reversible(coupling_parameter=...)`, `ALF(eta=...)`): use float64, or fewer steps."
)


def undo(
    terms: PyTree[AbstractTerm],
    solver: AbstractSolver,
    solution: Solution,
    dt0: RealScalarLike | None = None,
    args: Args = None,
    *,
    saveat: SaveAt = SaveAt(t1=True),
    stepsize_controller: AbstractStepSizeController = ConstantStepSize(),
    adjoint: AbstractAdjoint = ReversibleAdjoint(),
    max_steps: int | None = None,
    throw: bool = True,
    progress_meter: AbstractProgressMeter = NoProgressMeter(),
    reversal_rtol: float | None = None,
    on_failure: Action | None = None,
) -> Solution:
    """Undoes a solve with a reversible solver: goes back from its end to its start, along
    the very steps that it has made.

    Use it to get back what a flow was started from, to rounding: to invert a normalising
    flow or a diffusion model, to run an orbit back, or to look again at a solve that was
    not stored. It is not the same as a solve from `t1` to `t0`, which is another
    discretisation and ends elsewhere. For gradients there is no need for it:
    [`diffrax_reversible.ReversibleAdjoint`][] does the same by itself.

    ```python
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    end = diffrax.diffeqsolve(terms, solver, t0, t1, dt0, y0, args, saveat=saveat)
    start = undo(terms, solver, end, dt0, args)  # `start.ys[-1]` is `y0`
    ```

    The solve must have saved its end, by `SaveAt(t1=True, solver_state=True)`. The last
    entry of `solution.ys` is taken for the solution at the end, so do not let it be one of
    `SaveAt(ts=...)`, which is interpolated. What else it takes:

    - Adaptive steps: `stepsize_controller=RecordedSteps(...)`, both in the solve and here,
        and `SaveAt(..., controller_state=True)`. Steps that are constant or given
        ([`diffrax.StepTo`][], [`diffrax_reversible.ReplayedSteps`][]) need no record.
    - Where the flow contracts, a solver that restarts, like
        [`diffrax_reversible.ReversibleALF4`][], forgets: wrap it in
        [`diffrax_reversible.RecordedRestarts`][], both in the solve and here. A solve
        without a restart needs no record.
    - Pairs of terms: [`diffrax_reversible.StormerVerlet`][] and the other symplectic
        solvers have no solver state, and need nothing but the end.

    With `grid=...` of the compositions every bit is found again (of the initial state as
    rounded to the grid), as long as the vector field is: evaluate it in the same way on
    both ways, both with or without `jax.jit` and `jax.vmap`, on the same device.
    A solver that a step back undoes only nearly, as [`diffrax_reversible.EES25`][] and
    [`diffrax_reversible.EES27`][], is undone to rounding, too, by correcting what a step
    back has found: twice, which costs four steps more.

    **Arguments:** those of the [`diffrax.diffeqsolve`][] that is to be undone, and

    - `solution`: what it returned.
    - `saveat`: what to save on the way back, as for a solve from `t1` to `t0`: with
        `SaveAt(t1=True)` the start. `SaveAt(ts=...)` are times from `t1` down to `t0`, at
        which the solution is interpolated as the solve itself would have done;
        `SaveAt(steps=True)` saves all states at starts of steps, and
        `SaveAt(solver_state=True)` the solver state at the start.
    - `adjoint`, `throw`, `progress_meter`: of the way back. `max_steps` is only needed
        for `SaveAt(steps=...)`, `SaveAt(dense=True)` and diffrax's own adjoint methods.
    - `reversal_rtol`: a solver state starts as a function of the initial state, so the one
        that is found there can be checked, and is, up to the square root of this; and the
        solution is before each restart, up to this; and so is the last correction of a
        solver that is undone only nearly. `None`: as in `ReversibleAdjoint`.
        What contraction costs cannot be seen at the start: `e^(-a T)` costs
        `a T / log(10)` digits, of the 7 of float32 or the 16 of float64.
    - `on_failure`: what to do where the difference is larger: `"raise"` a `RuntimeError`
        at run time; make everything that is found `"nan"`; or `"warn"`. `None`: the first
        with `throw=True`, and else the second.

    **Returns:** a [`diffrax.Solution`][] from `t1` to `t0`.

    **Derivatives** in reverse mode, forward mode and forward over reverse mode, with
    respect to the solution, its solver state, `args` and `terms`, in memory that does not
    grow with the number of steps. When `t0` or `t1` moves, steps keep their places
    relative to the two, and so does each of constant ones.

    **Cost:** the evaluations of the vector field that the solve took, and one or two more
    for the check; a gradient evaluates it as often once more on the way, and three times
    in its sweep, with one vector-Jacobian product.

    **Raises:**

    - `ValueError` for a solver that is not reversible, an SDE that cannot be solved in
        reverse, and where something is missing of what the solve must have saved.
    - `NotImplementedError` for a solver with a `backward_step` that is made of one that
        restarts, and for jumps of the vector field with [`diffrax.ReversibleHeun`][].
    - an error at run time, if a restart has forgotten what it takes; if the end is not
        that of a step, as after an event that was located by a root finder; if the
        solution is wrong, since its two copies have drifted apart; and if what was found
        is not the start (see `on_failure`).

    A [`diffrax.LeapfrogMidpoint`][] that was given a `solver_state` at its start has
    forgotten when the step before that was: its solution is found, and its solver state
    is not.
    """
    ts: Any = solution.ts
    if not eqx.is_array(ts) or ts.size == 0:
        raise ValueError(
            "`undo` needs the solution at the end of the solve. Solve with "
            "`saveat=SaveAt(t1=True, solver_state=True)`. If there are several `subs`, "
            "pass a solution with the `ts` and `ys` of one, which has `t1=True`."
        )
    y1 = jtu.tree_map(lambda x: x[-1], solution.ys)
    return go_back(
        "undo",
        terms,
        solver,
        (solution.t0, solution.t1, ts[-1]),
        y1,
        solution.solver_state,
        dt0,
        args,
        solution.controller_state,
        solution.stats["num_accepted_steps"],
        dict(
            saveat=saveat,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=throw,
            progress_meter=progress_meter,
        ),
        stepsize_controller,
        reversal_rtol,
        on_failure,
    )


def go_back(
    name: str,
    terms: PyTree[AbstractTerm],
    solver: AbstractSolver,
    times: tuple,
    y1: Y,
    solver_state: PyTree,
    dt0: RealScalarLike | None,
    args: Args,
    controller_state: PyTree,
    count: IntScalarLike | None,
    options: dict[str, Any],
    controller: AbstractStepSizeController,
    rtol: float | None,
    on_failure: Action | None,
) -> Solution:
    """Undoes a solve from `times[0]` that was to end at `times[1]` and has ended at
    `times[2]`, after `count` steps; `None`: after all the steps that there are, and
    without a restart."""
    refuse(solver, terms, name)
    throw = options["throw"]
    if on_failure is None:
        on_failure = "raise" if throw else "nan"
    check_action(name, on_failure)
    dtype = jnp.result_type(times[2])
    t0, t1, t_end = (jnp.asarray(t, dtype) for t in times)
    direction = jnp.where(t0 < t1, 1, -1)
    if dt0 is not None:
        message = f"`{name}` does not differentiate with respect to `dt0`."
        dt0 = nondifferentiable(jnp.asarray(dt0, dtype), msg=message) * direction
    span = lax.stop_gradient(Span(t0 * direction, t1 * direction, dt0))
    steps = steps_of(
        controller, controller_state, direction, span, t_end * direction, count, name
    )
    if count is None and type(solver_state) is RestartState:
        # There were no restarts.
        age = jnp.asarray(steps.count, jnp.result_type(solver_state.age))
        solver_state = eqx.tree_at(lambda s: s.age, solver_state, age)
    forward = in_direction(terms, direction)
    expected = state_like(solver, forward, span.t0, y1, args)
    check_solver_state(solver, solver_state, expected, name)
    refuse_restarts_inside(solver, (y1, solver_state))
    y1 = refuse_lost_restarts(y1, solver_state, steps.count)
    y1 = eqx.error_if(
        y1,
        ~is_end_of_a_step(steps, span),
        f"`{name}` was not given the end of a step, or the steps do not start where the "
        "solve did. Save `SaveAt(t1=True)`, and pass the steps of the very solve. An event "
        "that was located by a root finder lies inside of a step, which cannot be undone "
        "from there: use `Event(root_finder=None)`.",
    )
    undone = UndoneSteps(steps, span)
    saveat = _with_start(options["saveat"], dtype, name)
    kwargs: dict[str, Any] = options | dict(saveat=saveat)
    # As `diffeqsolve` turns time around.
    back = jnp.where(t_end < t0, 1, -1)
    found = diffeqsolve(
        terms,
        Undone(solver, undone, t_end * back, t0 * back),
        t_end,
        t0,
        None,
        y1,
        args,
        stepsize_controller=undone,
        solver_state=UndoneState(steps.count, solver_state, jnp.int32(0)),
        **kwargs,
    )
    (ts, _), (ys, y0) = found.ts, found.ys  # pyright: ignore
    y0, state = jtu.tree_map(lambda x: x[-1], y0), found.solver_state
    assert type(state) is UndoneState
    okay = _is_start(
        name,
        solver,
        (forward, span.t0, args),
        (y0, state),
        (y1, solver_state),
        steps.count,
        rtol,
        OnFailure(on_failure, call_site()),
    )
    saved = state.solver_state if options["saveat"].solver_state else None
    # Who warns is content, and must not be optimised away.
    ys, saved = _or_nan(okay, (ys, saved))
    where = lambda s: (s.ts, s.ys, s.solver_state)
    return eqx.tree_at(where, found, (ts, ys, saved), is_leaf=lambda x: x is None)


def _with_start(saveat: SaveAt, dtype: Any, name: str) -> SaveAt:
    """What to save, and the start besides."""
    if saveat.controller_state or saveat.made_jump:
        raise ValueError(
            f"`{name}(..., saveat=SaveAt(controller_state=True))` and `made_jump=True` "
            "are not supported: nothing is left of them on the way back."
        )
    is_sub = lambda x: isinstance(x, SubSaveAt)
    leaves = lambda subs: [
        x.ts
        for x in jtu.tree_leaves(subs, is_leaf=is_sub)
        if is_sub(x) and x.ts is not None
    ]
    # Times of another dtype would change that of the solution.
    cast = lambda ts: jnp.asarray(ts, dtype)
    subs = saveat.subs
    if len(leaves(subs)) > 0:
        subs = eqx.tree_at(leaves, subs, replace_fn=cast)
    both = (subs, SubSaveAt(t1=True))
    return SaveAt(subs=both, dense=saveat.dense, solver_state=True)


def _is_start(
    name: str,
    solver: AbstractSolver,
    problem: tuple,
    start: tuple[Y, UndoneState],
    end: tuple[Y, PyTree],
    count: IntScalarLike,
    rtol: RealScalarLike | None,
    on_failure: OnFailure,
) -> BoolScalarLike:
    """Whether what was found can be the start. Raises or warns at run time if not."""
    (terms, t0, args), (y0, state), (y1, solver_state1) = problem, start, end
    problem = (terms, t0, args, y0, state, y1, solver_state1)
    dynamic, static = eqx.partition(problem, eqx.is_array)
    problem = eqx.combine(lax.stop_gradient(dynamic), static)
    terms, t0, args, y0, state, y1, solver_state1 = problem
    solver_state0 = state.solver_state
    size = jnp.maximum(norm(y0), norm(y1))
    accepted = default_rtol(y1, count) if rtol is None else rtol
    accepted = jnp.asarray(accepted, size.dtype)
    loss = from_bits(state.loss).astype(size.dtype)
    okay = jnp.array(True)
    if type(solver_state1) is RestartState and not solver_state1.restarts:
        difference, largest = jtu.tree_map(jnp.asarray, solver_state1.largest)
        okay = is_solution(on_failure, difference, largest, okay)

    def check(loss, size, rtol, what):
        def describe(element, loss, rtol):
            return _LOST.format(
                name=name, element=element, what=what, loss=loss, rtol=rtol
            )

        loss = loss / jnp.where(size == 0, 1, size)
        # A solve that has failed tells so itself.
        loss = jnp.where(jnp.isfinite(loss) | jnp.isfinite(size), loss, 0)
        return is_trusted(loss, rtol, on_failure, describe)

    okay = okay & check(loss, size, accepted, "solution before a restart")
    fresh, is_fresh = _floating(solver.init(terms, t0, t0, y0, args)), count > 0
    if type(solver_state0) is RestartState:
        is_fresh = is_fresh & (solver_state0.age == 0)
        if solver_state0.record is not None:
            is_fresh = is_fresh & (solver_state0.record.count == 0)
    if len(jtu.tree_leaves(fresh)) > 0:
        found = _floating(solver_state0)
        loss = norm(jtu.tree_map(jnp.subtract, found, fresh))
        size = jnp.maximum(norm(_floating(solver_state1)), norm(fresh))
        loss = jnp.where(is_fresh, loss, 0)
        okay = okay & check(loss, size, jnp.sqrt(accepted), "solver state")
    return okay


def _floating(solver_state: PyTree) -> PyTree[Array]:
    return eqx.filter(copy_of(solver_state), eqx.is_inexact_array)


def _or_nan(okay: BoolScalarLike, x: PyTree) -> PyTree:
    def one(x):
        if not eqx.is_inexact_array(x):
            return x
        return jnp.where(okay, x, jnp.full_like(x, jnp.nan))

    return jtu.tree_map(one, x)
