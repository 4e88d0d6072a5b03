"""What `InterpolatedAdjoint` supports and what not, and its solve of the adjoint
equation."""

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractTerm,
    ClipStepSizeController,
    MultiTerm,
    ODETerm,
    StepTo,
)

from ..._compat import is_sde, save_y, WrapTerm
from ..._controller.recorded import RecordedSteps
from ..._controller.replayed import ReplayedSteps
from ..._loop.closures import is_subsaveat
from ..._solver.runge_kutta.tableau import with_differentiable_stages


_WAYS_OUT = (
    "Use `adjoint=ReversibleAdjoint()` with a reversible solver, or "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)
KEYWORDS = ("dt0", "max_steps", "solver", "stepsize_controller")


def unsupported(what: str) -> NotImplementedError:
    message = f"`adjoint=InterpolatedAdjoint(...)` does not support {what}. {_WAYS_OUT}"
    return NotImplementedError(message)


def not_differentiated(what: str) -> str:
    return (
        f"`adjoint=InterpolatedAdjoint(...)` does not differentiate with respect to "
        f"{what}. Use `jax.lax.stop_gradient` on it. {_WAYS_OUT}"
    )


def _is_ordinary(term: AbstractTerm) -> bool:
    if isinstance(term, WrapTerm):
        return _is_ordinary(term.term)
    if isinstance(term, MultiTerm):
        return all(map(_is_ordinary, term.terms))
    return isinstance(term, ODETerm)


def refuse_unsupported(solver, terms, saveat, event) -> None:
    if event is not None:
        raise unsupported("`diffeqsolve(..., event=...)`")
    if is_sde(terms):
        raise unsupported("stochastic differential equations")
    if jtu.tree_structure(solver.term_structure) != jtu.tree_structure(0):
        raise unsupported(
            f"`{type(solver).__name__}`, a solver of several terms for several parts of "
            "the state"
        )
    if not _is_ordinary(terms):
        raise unsupported(
            "terms other than `ODETerm` and `MultiTerm`s of these. (A `ControlTerm` "
            "whose control is differentiable is made one by `ControlTerm.to_ode()`.)"
        )
    if saveat.dense:
        raise unsupported("`SaveAt(dense=True)`")
    for sub in jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat):
        if sub.steps:
            raise unsupported("`SaveAt(steps=...)`, whose times depend on the solve")
        if sub.fn is not save_y:
            raise unsupported(
                "`SaveAt(fn=...)`. (A function of what is saved may as well be taken "
                "after the solve.)"
            )


def _chain(controller):
    """A controller, the one inside of it, the one inside of that, ..."""
    while isinstance(controller, ClipStepSizeController | RecordedSteps):
        yield controller
        controller = controller.controller
    yield controller


def jump_times(controller, dtype):
    jumps = [
        jnp.asarray(c.jump_ts, dtype)
        for c in _chain(controller)
        if isinstance(c, ClipStepSizeController) and c.jump_ts is not None
    ]
    return jnp.concatenate([jnp.zeros(0, dtype), *jumps])


def backward_options(kwargs, direction, solver, stepsize_controller, dt0, max_steps):
    """The arguments of `diffeqsolve` for the adjoint equation."""
    if "stepsize_controller" in kwargs:
        controller = kwargs["stepsize_controller"].wrap(direction)
    else:
        controller = stepsize_controller
        while isinstance(controller, RecordedSteps):
            # Its record would not be looked at.
            controller = controller.controller
        if any(isinstance(c, StepTo | ReplayedSteps) for c in _chain(controller)):
            raise ValueError(
                f"`{type(controller).__name__}` has no steps for the adjoint equation. "
                "Pass `InterpolatedAdjoint(..., stepsize_controller=...)`."
            )
    dt0 = kwargs.get("dt0", dt0)
    return dict(
        solver=with_differentiable_stages(kwargs.get("solver", solver)),
        stepsize_controller=controller,
        dt0=None if dt0 is None else -jnp.abs(dt0),
        max_steps=kwargs.get("max_steps", max_steps),
    )
