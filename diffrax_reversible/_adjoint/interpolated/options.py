"""What `InterpolatedAdjoint` supports and what not, and its solve of the adjoint
equation."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractTerm,
    ClipStepSizeController,
    MultiTerm,
    ODETerm,
    StepTo,
)

from ..._compat import is_sde, named_axes, save_y, WrapTerm
from ..._controller.recorded import RecordedSteps
from ..._controller.replayed import ReplayedSteps
from ..._loop.closures import is_subsaveat
from ..._solver.runge_kutta.tableau import with_differentiable_stages
from ..._types import RealScalarLike, Y
from .problem import Model


_WAYS_OUT = (
    "Use `adjoint=ReversibleAdjoint()` with a reversible solver, "
    "`adjoint=SymplecticAdjoint()` with a Runge-Kutta solver, or "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)


def unsupported(what: str) -> str:
    return f"`adjoint=InterpolatedAdjoint(...)` does not support {what}. {_WAYS_OUT}"


def not_differentiated(what: str) -> str:
    return (
        f"`adjoint=InterpolatedAdjoint(...)` does not differentiate with respect to "
        f"{what}. Use `jax.lax.stop_gradient` on it. {_WAYS_OUT}"
    )


def _is_ordinary(term: AbstractTerm) -> bool:
    """Whether `vf` at a time is all that a term depends on."""
    if isinstance(term, WrapTerm):
        return _is_ordinary(term.term)
    kind = MultiTerm if isinstance(term, MultiTerm) else ODETerm
    overridden = [
        name
        for name in ("vf", "contr", "prod", "vf_prod")
        if getattr(type(term), name) is not getattr(kind, name)
    ]
    parts = term.terms if isinstance(term, MultiTerm) else ()
    return len(overridden) == 0 and all(map(_is_ordinary, parts))


def _refuse(what: str):
    raise NotImplementedError(unsupported(what))


def refuse_unsupported_terms(solver, terms) -> None:
    refuse = _refuse
    if is_sde(terms):
        refuse("stochastic differential equations")
    if jtu.tree_structure(solver.term_structure) != jtu.tree_structure(0):
        refuse(
            f"`{type(solver).__name__}`, a solver of several terms for several parts of "
            "the state"
        )
    if not _is_ordinary(terms):
        refuse(
            "terms other than `ODETerm` and `MultiTerm`s of these, nor subclasses with "
            "methods of their own. (A `ControlTerm` whose control is differentiable is "
            "made one by `ControlTerm.to_ode()`.)"
        )


def refuse_unsupported(solver, terms, saveat, event) -> None:
    refuse = _refuse
    if event is not None:
        refuse("`diffeqsolve(..., event=...)`")
    refuse_unsupported_terms(solver, terms)
    if saveat.dense:
        refuse("`SaveAt(dense=True)`")
    for sub in jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat):
        if sub.steps:
            refuse("`SaveAt(steps=...)`, whose times depend on the solve")
        if sub.fn is not save_y:
            refuse(
                "`SaveAt(fn=...)`. (A function of what is saved may as well be taken "
                "after the solve.)"
            )


def _chain(controller):
    """A controller, the one inside of it, the one inside of that, ..."""
    while isinstance(controller, ClipStepSizeController | RecordedSteps):
        yield controller
        controller = controller.controller
    yield controller


def _without_record(controller):
    return next(c for c in _chain(controller) if not isinstance(c, RecordedSteps))


def jump_times(controller, dtype):
    jumps = [
        jnp.asarray(c.jump_ts, dtype)
        for c in _chain(controller)
        if isinstance(c, ClipStepSizeController) and c.jump_ts is not None
    ]
    return jnp.concatenate([jnp.zeros(0, dtype), *jumps])


def backward_options(
    own: dict[str, Any], direction, solver, stepsize_controller, dt0, max_steps
) -> dict[str, Any]:
    """The arguments of `diffeqsolve` for the adjoint equation.

    - `own`: those of `InterpolatedAdjoint`, `None` for what is as in the solve.
    """
    if own["stepsize_controller"] is not None:
        stepsize_controller = own["stepsize_controller"].wrap(direction)
    else:
        # A record would not be looked at.
        stepsize_controller = _without_record(stepsize_controller)
        if any(
            isinstance(c, StepTo | ReplayedSteps) for c in _chain(stepsize_controller)
        ):
            raise ValueError(
                f"`{type(stepsize_controller).__name__}` has no steps for the adjoint "
                "equation. Pass `InterpolatedAdjoint(..., stepsize_controller=...)`."
            )
    dt0 = dt0 if own["dt0"] is None else own["dt0"]
    return dict(
        solver=with_differentiable_stages(own["solver"] or solver),
        stepsize_controller=stepsize_controller,
        dt0=None if dt0 is None else -jnp.abs(dt0),
        max_steps=own["max_steps"] or max_steps,
    )


def refuse_collectives(model: Model, t: RealScalarLike, y: Y) -> None:
    """Raises `NotImplementedError` for a vector field that looks at a whole batch. Its
    elements would choose the steps of their adjoint equations each for itself, and be at
    different times: there is no differential equation that they solve together."""
    axes = named_axes(jax.make_jaxpr(model.vector_field)(t, y).jaxpr)
    if len(axes) > 0:
        message = unsupported(
            "a vector field with a collective, such as `jax.lax.pmean`, over "
            f"{', '.join(map(repr, axes))}"
        )
        raise NotImplementedError(f"{message} Or make the whole batch one state.")
