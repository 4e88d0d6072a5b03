"""How each solver is reversed."""

from typing import cast

from diffrax import AbstractSolver

from .base import AbstractReversibleSolver


def as_reversible(solver: AbstractSolver) -> AbstractReversibleSolver:
    """What undoes the steps of `solver` and pulls them back.

    **Raises:** `ValueError` if nothing does.
    """
    # Not `isinstance`, which for a wrapped solver like `HalfSolver` also asks the
    # solver inside, whose reverse is not that of the wrapper.
    if issubclass(type(solver), AbstractReversibleSolver):
        return cast(AbstractReversibleSolver, solver)
    raise ValueError(
        f"`adjoint=ReversibleAdjoint()` needs a reversible solver, and "
        f"`{type(solver).__name__}` is not one. Use a reversible solver, for example "
        "`solver=ReversibleALF4()`, or an adjoint method for any solver, "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )
