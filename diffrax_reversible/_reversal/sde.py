"""What cannot be solved, or not be undone, under Brownian motion."""

from diffrax import (
    AbstractItoSolver,
    AbstractSolver,
    AbstractStratonovichSolver,
    AbstractTerm,
)
from jaxtyping import PyTree

from .._checks import written
from .._compat import is_sde, is_unsafe_sde
from .._solver.runge_kutta.tableau import (
    steps_by_diagonal_tableaus,
    steps_by_tableau,
)
from .registry import is_reversible


def refuse_unsafe_sde(name: str, terms: PyTree[AbstractTerm]) -> None:
    """Raises `ValueError` for a Brownian motion that cannot be looked up again, which
    the adjoint method `name` has to."""
    if is_sde(terms) and is_unsafe_sde(terms):
        raise ValueError(
            f"`adjoint={name}()` must look up again every increment of the Brownian "
            "motion that the solve has seen, which `UnsafeBrownianPath` does not "
            "promise. Use `diffrax.VirtualBrownianTree`."
        )


def refuse_sde(solver: AbstractSolver, terms: PyTree[AbstractTerm]) -> None:
    """Raises `ValueError` for an SDE that `solver` and its reverse do not fit."""
    if not is_sde(terms):
        return
    refuse_unsafe_sde("ReversibleAdjoint", terms)
    if isinstance(solver, AbstractItoSolver):
        why = (
            "converges to the Itô solution of an SDE, which is not the solution of the "
            "SDE run backwards in time"
        )
    elif not isinstance(solver, AbstractStratonovichSolver):
        why = "is not known to converge to the Stratonovich solution of an SDE"
    elif not is_reversible(solver):
        why = "is not reversible"
    else:
        return
    name = written(solver)
    adjoint = "diffrax.RecursiveCheckpointAdjoint"
    if steps_by_tableau(type(solver)) or steps_by_diagonal_tableaus(type(solver)):
        adjoint = "SymplecticAdjoint"
    raise ValueError(
        f"`solver={name}` {why}, so that `adjoint=ReversibleAdjoint()` does not support "
        f"it. Use `solver={name}, adjoint={adjoint}()`; or, for the Stratonovich "
        "solution, a reversible solver that converges to it, for example "
        "`solver=diffrax.ReversibleHeun()` or `solver=Reversible(diffrax.Heun())`."
    )
