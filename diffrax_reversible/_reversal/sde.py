"""What cannot be solved, or not be undone, under Brownian motion."""

from diffrax import (
    AbstractItoSolver,
    AbstractSolver,
    AbstractStratonovichSolver,
    AbstractTerm,
)
from jaxtyping import PyTree

from .._compat import is_sde, is_unsafe_sde


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
    name = type(solver).__name__
    stratonovich = (
        "Use a solver that converges to the Stratonovich solution, for example "
        "`diffrax.ReversibleHeun()` or `Reversible(diffrax.Heun())`"
    )
    refuse_unsafe_sde("ReversibleAdjoint", terms)
    if isinstance(solver, AbstractItoSolver):
        raise ValueError(
            f"`solver={name}()` converges to the Itô solution of an SDE, which is not "
            "the solution of the SDE run backwards in time, so that "
            f"`adjoint=ReversibleAdjoint()` does not support it. {stratonovich}."
        )
    if not isinstance(solver, AbstractStratonovichSolver):
        raise ValueError(
            f"`solver={name}()` is not known to converge to the Stratonovich solution "
            f"of an SDE. {stratonovich}."
        )
