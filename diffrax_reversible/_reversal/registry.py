"""How each solver is reversed."""

from collections.abc import Callable
from typing import cast

from diffrax import (
    AbstractSolver,
    LeapfrogMidpoint,
    ReversibleHeun,
    SemiImplicitEuler,
)

from .._solver.symplectic.semi_implicit_euler import SemiImplicitEulerUpdates
from .._solver.updates.solver import AbstractReversibleSolver
from .backward_step import StepReversal
from .base import AbstractReversal, UpdatesReversal
from .leapfrog_midpoint import LeapfrogReversal
from .reversible_heun import HeunReversal


_reversals: dict[type[AbstractSolver], Callable[[], AbstractReversal]] = {
    ReversibleHeun: HeunReversal,
    LeapfrogMidpoint: LeapfrogReversal,
    SemiImplicitEuler: lambda: UpdatesReversal(SemiImplicitEulerUpdates()),
}


def as_reversible(solver: AbstractSolver) -> AbstractReversal:
    """What undoes the steps of `solver` and pulls them back.

    **Raises:** `ValueError` if nothing does.
    """
    # Not `isinstance`, which for a wrapped solver like `HalfSolver` also asks the
    # solver inside, whose reverse is not that of the wrapper. And not subclasses of
    # diffrax's solvers, which may step differently.
    kind = type(solver)
    if issubclass(kind, AbstractReversibleSolver):
        return UpdatesReversal(cast(AbstractReversibleSolver, solver))
    if kind in _reversals:
        return _reversals[kind]()
    if hasattr(kind, "backward_step"):
        return StepReversal(solver)
    raise ValueError(
        f"`adjoint=ReversibleAdjoint()` needs a reversible solver, and "
        f"`{kind.__name__}` is not one. Use a reversible solver, for example "
        "`solver=ReversibleALF4()`; or make an explicit Runge-Kutta solver reversible, "
        "for example `solver=Reversible(diffrax.Tsit5())`; or use an adjoint method for "
        "any solver, `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )
