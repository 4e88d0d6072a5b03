"""What `SymplecticAdjoint` does not differentiate, and what does."""

import lineax as lx
from diffrax import AbstractSolver, AbstractTerm, AbstractWrappedSolver
from jaxtyping import PyTree

from ..._checks import written
from ..._reversal.registry import reversal_of
from ..._reversal.sde import refuse_sde, refuse_unsafe_sde
from ..._solver.runge_kutta.tableau import (
    steps_by_diagonal_tableaus,
    steps_by_tableau,
)
from ..interpolated.options import refuse_unsupported_terms


def _is_supported(check, *args) -> bool:
    try:
        check(*args)
    except (ValueError, NotImplementedError):
        return False
    return True


def _way_out(solver: AbstractSolver, terms: PyTree[AbstractTerm]) -> str:
    """The adjoint methods that differentiate this solve, best first."""
    ways = []
    if _is_supported(reversal_of, solver) and _is_supported(refuse_sde, solver, terms):
        ways.append(
            "`adjoint=ReversibleAdjoint()`, which undoes the steps of this solver"
        )
    # diffrax's own forward mode, by which the adjoint equation is solved, does not take
    # wrapped solvers.
    elif not isinstance(solver, AbstractWrappedSolver) and _is_supported(
        refuse_unsupported_terms, solver, terms
    ):
        ways.append(
            "`adjoint=InterpolatedAdjoint(nodes)` for an approximate gradient with any "
            "solver"
        )
    ways.append("`adjoint=diffrax.RecursiveCheckpointAdjoint()`")
    return ", or ".join(ways)


def refuse_unsupported(
    solver: AbstractSolver, terms: PyTree[AbstractTerm], keep: str
) -> None:
    """Raises for solvers and terms that are not supported.

    - `keep`: what is to be kept of each step.
    """
    # Not `isinstance`, which would also ask the solver inside of a wrapped solver.
    kind = type(solver)
    if not (steps_by_tableau(kind) or steps_by_diagonal_tableaus(kind)):
        raise ValueError(
            "`adjoint=SymplecticAdjoint()` differentiates explicit and diagonally "
            "implicit Runge-Kutta solvers, for example `solver=diffrax.Tsit5()` or "
            "`solver=diffrax.Kvaerno5()`, that do not override `step`; got "
            f"`solver={kind.__name__}()`. Use {_way_out(solver, terms)}."
        )
    if keep == "residuals" and not steps_by_tableau(kind):
        raise NotImplementedError(
            '`adjoint=SymplecticAdjoint(keep="residuals")` is for explicit Runge-Kutta '
            "solvers with one tableau, for example `solver=diffrax.Tsit5()`; got "
            f'`solver={kind.__name__}()`. Use `keep="stages"`.'
        )
    refuse_unsafe_sde("SymplecticAdjoint", terms)


def refuse_linear_options(
    solver: AbstractSolver,
    linear_solver: lx.AbstractLinearSolver | None,
    linear_tags: frozenset[object],
) -> None:
    """Raises for a way to solve linear systems where there are none."""
    given = [
        name
        for name, is_given in (
            ("linear_solver", linear_solver is not None),
            ("linear_tags", len(linear_tags) > 0),
        )
        if is_given
    ]
    if len(given) > 0 and steps_by_tableau(type(solver)):
        raise ValueError(
            f"`SymplecticAdjoint({given[0]}=...)` is for implicit solvers, and "
            f"`solver={written(solver)}` is explicit: it has no linear systems. Use "
            f"`adjoint=SymplecticAdjoint()` without `{given[0]}`."
        )
