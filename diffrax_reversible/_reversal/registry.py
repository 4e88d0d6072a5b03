"""Which reversal undoes the steps of which solver."""

from diffrax import (
    AbstractSolver,
    LeapfrogMidpoint,
    ReversibleHeun,
    SemiImplicitEuler,
)

from .._checks import written
from .._solver.base import AbstractReversibleSolver
from .._solver.runge_kutta.tableau import (
    steps_by_diagonal_tableaus,
    steps_by_tableau,
)
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


def _known(kind: type[AbstractSolver]) -> AbstractReversal | None:
    """That of a solver of diffrax."""
    for known, reversal in _reversals.items():
        if issubclass(kind, known):
            if kind.step is known.step and kind.init is known.init:
                return reversal
    return None


def is_reversible(solver: AbstractSolver) -> bool:
    """Whether a solver is of a reversible kind."""
    # Not `isinstance`, which for a wrapped solver like `HalfSolver` also asks the
    # solver inside, whose reversal is not that of the wrapper.
    kind = type(solver)
    return _known(kind) is not None or issubclass(kind, AbstractReversibleSolver)


def reversal_of(solver: AbstractSolver) -> AbstractReversal:
    """The reversal of a solver.

    **Raises:** `ValueError` if there is none.
    """
    kind = type(solver)
    if not is_reversible(solver):
        raise ValueError(
            "`adjoint=ReversibleAdjoint()` undoes the steps of a reversible solver, "
            f"which `solver={written(solver)}` is not. {_ways_out(solver)}"
        )
    known = _known(kind)
    if known is not None:
        return known
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


def _ways_out(solver: AbstractSolver) -> str:
    kind, same = type(solver), written(solver)
    any_solver = (
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`, which takes any solver"
    )
    is_explicit = steps_by_tableau(kind)
    if is_explicit or steps_by_diagonal_tableaus(kind):
        example = f"Reversible({same})" if is_explicit else "ReversibleALF4()"
        return (
            f"Use `solver={same}, adjoint=SymplecticAdjoint()`, which gives exact "
            "gradients; or, where these must not take more memory for more steps, a "
            f"reversible solver, for example `solver={example}`; or {any_solver}."
        )
    return (
        f"Use {any_solver}; or a reversible solver, for example "
        "`solver=ReversibleALF4()`. A solver of your own must be an "
        "`AbstractReversibleSolver`."
    )
