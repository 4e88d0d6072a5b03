"""Which reversal undoes the steps of which solver."""

from diffrax import (
    AbstractSolver,
    LeapfrogMidpoint,
    ReversibleHeun,
    SemiImplicitEuler,
)

from .._solver.base import AbstractReversibleSolver
from .._solver.symplectic.semi_implicit_euler import SemiImplicitEulerUpdates
from .._solver.updates.solver import AbstractUpdateSolver
from .backward_step import BackwardStepReversal
from .base import AbstractReversal
from .leapfrog_midpoint import LeapfrogMidpointReversal
from .reversible_heun import ReversibleHeunReversal
from .updates import UpdatesReversal


_reversals: dict[type[AbstractSolver], AbstractReversal] = {
    ReversibleHeun: ReversibleHeunReversal(),
    LeapfrogMidpoint: LeapfrogMidpointReversal(),
    SemiImplicitEuler: UpdatesReversal(SemiImplicitEulerUpdates()),
}


def _defines(kind: type[AbstractSolver], name: str) -> type | None:
    """The class from which `kind` has a method."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def reversal_of(solver: AbstractSolver) -> AbstractReversal:
    """The reversal of a solver.

    **Raises:** `ValueError` if there is none.
    """
    # Not `isinstance`, which for a wrapped solver like `HalfSolver` also asks the
    # solver inside, whose reversal is not that of the wrapper.
    kind = type(solver)
    for known, reversal in _reversals.items():
        if issubclass(kind, known):
            if kind.step is known.step and kind.init is known.init:
                return reversal
    if issubclass(kind, AbstractReversibleSolver):
        step, backward = _defines(kind, "step"), _defines(kind, "backward_step")
        if step is backward is AbstractUpdateSolver:
            return UpdatesReversal()
        assert step is not None and backward is not None
        if issubclass(backward, step):
            return BackwardStepReversal()
        raise ValueError(
            f"`{kind.__name__}` overrides `step`, but not `backward_step`, so that "
            "`adjoint=ReversibleAdjoint()` cannot undo its steps. Override both, or use "
            "an adjoint method for any solver, "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    raise ValueError(
        f"`adjoint=ReversibleAdjoint()` needs a reversible solver, and "
        f"`{kind.__name__}` is not one. Use a reversible solver, for example "
        "`solver=ReversibleALF4()`; or make an explicit Runge-Kutta solver reversible, "
        "for example `solver=Reversible(diffrax.Tsit5())`; or use an adjoint method for "
        "any solver, `adjoint=diffrax.RecursiveCheckpointAdjoint()`. A solver of your "
        "own must be an `AbstractReversibleSolver`."
    )
