"""What of a finished solve is needed to undo it, and what is missing."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractSolver,
    AbstractStepSizeController,
    AbstractTerm,
    ConstantStepSize,
    StepTo,
)
from jaxtyping import PyTree

from .._compat import nondifferentiable
from .._controller import RecordedState, RecordedSteps, ReplayedSteps
from .._loop.state import Span
from .._loop.steps import knows_its_steps, Steps, UndoneSteps
from .._reversal.registry import reversal_of
from .._reversal.sde import refuse_sde
from .._solver.updates.restart import RestartState
from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y


def refuse(solver: AbstractSolver, terms: PyTree, name: str) -> None:
    """Raises for what cannot be undone."""
    kind = type(solver).__name__
    try:
        reversal_of(solver)
    except ValueError as error:
        raise ValueError(
            f"`{name}` cannot undo the steps of `{kind}`: it needs a reversible solver, "
            "with a `backward_step` that goes with its `step`. Solve with one, for "
            "example `ReversibleALF4()`, or `Reversible(diffrax.Tsit5())`."
        ) from error
    try:
        refuse_sde(solver, terms)
    except ValueError as error:
        raise ValueError(
            f"`{name}` cannot undo this solve of an SDE with `{kind}`: it needs a solver "
            "that converges to the Stratonovich solution, for example "
            "`diffrax.ReversibleHeun()`, and a `diffrax.VirtualBrownianTree`."
        ) from error


def steps_of(
    controller: AbstractStepSizeController,
    controller_state: PyTree,
    direction: IntScalarLike,
    span: Span,
    t_end: RealScalarLike,
    count: IntScalarLike | None,
    name: str,
) -> Steps:
    """The accepted steps of a solve, in the time `direction * t`.

    - `count`: how many there were; `None` if the solve has made all the steps that the
        controller knows of.
    """
    if isinstance(controller, RecordedSteps):
        if not isinstance(controller_state, RecordedState):
            raise ValueError(
                f"`{name}` needs the steps that `RecordedSteps(...)` has recorded. Solve "
                "with `saveat=SaveAt(t1=True, solver_state=True, controller_state=True)`."
            )
        controller = ReplayedSteps(controller_state.record)
    elif knows_its_steps(controller) and not isinstance(controller, UndoneSteps):
        # Their times are not those of the solve, which move with `t0` and `t1`.
        message = (
            f"`{name}` does not differentiate with respect to steps that are given."
        )
        controller = nondifferentiable(controller, msg=message)
    else:
        kind = type(controller).__name__
        raise ValueError(
            f"`{name}` must know the steps that were accepted, which "
            f"`stepsize_controller={kind}(...)` does not. Solve with "
            f"`stepsize_controller=RecordedSteps({kind}(...))` and `saveat=SaveAt("
            "t1=True, solver_state=True, controller_state=True)`, and pass "
            f"`stepsize_controller=RecordedSteps({kind}(...))` to `{name}` as well."
        )
    controller, span, t_end = lax.stop_gradient((controller, span, t_end))
    controller, state = controller.wrap(direction), None
    if isinstance(controller, ReplayedSteps):
        count = controller.record.count
    elif isinstance(controller, StepTo):
        count = len(controller.ts) - 1 if count is None else count
    else:
        assert isinstance(controller, ConstantStepSize)
        if span.dt0 is None:
            raise ValueError(
                f"`{name}` needs the `dt0` of the solve, whose steps were constant. If "
                f"they were not, pass the `stepsize_controller` of the solve to `{name}`."
            )
        nothing = (None,) * 3
        arguments = (None, span.t0, span.t1, None, span.dt0, *nothing)
        _, (completed, number, *bounds) = controller.init(*arguments)  # pyright: ignore
        count = jnp.where(span.t0 < span.t1, number, 0) if count is None else count
        completed = completed + jnp.asarray(count, jnp.result_type(completed))
        state = (completed, number, *bounds)
    return Steps(controller, state, jnp.asarray(count, int), t_end, False, None)


def is_end_of_a_step(steps: Steps, span: Span) -> BoolScalarLike:
    """Whether `steps.t_end` is where the last step ended, and whether the first one started
    at the start of the solve."""
    count, controller = steps.count, steps.controller
    where = lambda s: (s.count, s.controller_state, s.t_end)
    state = steps.controller_state
    if isinstance(controller, ConstantStepSize):
        completed, *rest = state
        state = (completed + 1, *rest)
    # As if there was another step afterwards.
    longer = eqx.tree_at(
        where, steps, (count + 1, state, span.t1), is_leaf=lambda x: x is None
    )
    first, _ = longer.interval(0, span)
    start, end = longer.interval(jnp.maximum(count - 1, 0), span)
    # diffrax may have moved it by a few units in the last place.
    near = jnp.abs(end - steps.t_end) <= 1e-3 * jnp.abs(end - start)
    return (near & (first == span.t0)) | ((count == 0) & (steps.t_end == span.t0))


def state_like(
    solver: AbstractSolver,
    terms: PyTree[AbstractTerm],
    t: RealScalarLike,
    y: Y,
    args: Args,
) -> PyTree:
    """The shape of the solver state."""
    return eqx.filter_eval_shape(solver.init, terms, t, t, y, args)


def check_solver_state(
    solver: AbstractSolver, solver_state: PyTree, expected: PyTree, name: str
) -> None:
    """Raises `ValueError` if the solver state cannot be that of the solver."""
    if jtu.tree_structure(solver_state) == jtu.tree_structure(expected):
        shapes = lambda x: [jnp.shape(a) for a in jtu.tree_leaves(x)]
        if shapes(solver_state) == shapes(expected):
            return
    kind = type(solver).__name__
    if solver_state is None:
        raise ValueError(
            f"`{name}` needs the solver state of `{kind}` at the end of the solve. Solve "
            "with `saveat=SaveAt(t1=True, solver_state=True)`."
        )
    raise ValueError(
        f"`{name}` was given an end whose solver state is not one of `{kind}` for a "
        "solution of this shape. Pass the same solver as to `diffeqsolve`, and save the "
        "solution itself, by `SaveAt(t1=True, solver_state=True)` without a `fn`."
    )


def refuse_lost_restarts(y1: Y, solver_state: PyTree, count: IntScalarLike) -> Y:
    """`y1`; raises, when it is run, if there was a restart before which the state was not
    kept."""
    if type(solver_state) is not RestartState:
        return y1
    known, record = jnp.asarray(solver_state.age), solver_state.record
    if record is not None:
        number, capacity = record.count, record.capacity
        # A compiled program cannot say how many.
        y1 = eqx.error_if(
            y1,
            number > capacity,
            "The solve restarted more often than there is room for the states before. "
            f"Solve with `RecordedRestarts(..., capacity=...)` larger than {capacity}; "
            "`solution.solver_state.record.count` says how many there were.",
        )
        filled = jnp.arange(capacity) < number
        known = known + jnp.sum(jnp.where(filled, record.ages, 0))
    return eqx.error_if(
        y1,
        known < count,
        "The solve restarted, as a reversible solver does where the flow contracts, and "
        "what a restart forgets cannot be undone. Solve with "
        "`solver=RecordedRestarts(solver)`, which keeps the states before restarts; or "
        "with `restart=None`, if the flow contracts only a little.",
    )
