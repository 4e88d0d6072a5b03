"""The stages of a Runge-Kutta step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractERK,
    AbstractRungeKutta,
    AbstractSolver,
    AbstractTerm,
    ButcherTableau,
    Euler,
    ImplicitEuler,
    MultiButcherTableau,
)
from jaxtyping import PyTree

from ..._compat import ω
from ..._tree import combine
from ..._types import Args, RealScalarLike, Y


class Tableau(NamedTuple):
    """The stages that a base step needs.

    - `a`, `b`, `c`: as usual, `a` strictly lower triangular.
    - `error`: weights of the stages in the error estimate; `None`: no estimate.
    - `error_end`: weight in it of the slope at the end of the step.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    error: np.ndarray | None
    error_end: float = 0.0


def with_differentiable_stages(solver: AbstractSolver) -> AbstractSolver:
    """The solver, with loops over stages that know forward mode, which the default ones
    do not; also those of a solver inside of it."""
    # Not `isinstance`, which would also ask the solver inside of a wrapped solver.
    is_leaf = lambda x: issubclass(type(x), AbstractRungeKutta)

    def one(x):
        if not is_leaf(x) or x.scan_kind is not None:
            return x
        is_none = lambda x: x is None
        return eqx.tree_at(lambda s: s.scan_kind, x, "lax", is_leaf=is_none)

    return jtu.tree_map(one, solver, is_leaf=is_leaf)


def steps_by_tableau(kind: type[AbstractSolver]) -> bool:
    """Whether solvers of this class step as their tableau says: explicit Runge-Kutta
    solvers that do not override how diffrax makes a step."""
    if issubclass(kind, Euler):
        return kind.step is Euler.step and kind.init is Euler.init
    return (
        issubclass(kind, AbstractERK)
        and kind.step is AbstractERK.step
        and kind.init is AbstractERK.init
        and isinstance(kind.tableau, ButcherTableau)
    )


def full_tableau_of(kind: type[AbstractSolver]) -> Tableau:
    """The tableau of one of diffrax's explicit Runge-Kutta solvers, or of
    [`diffrax.Euler`][]."""
    if issubclass(kind, Euler):
        return Tableau(np.zeros((1, 1)), np.ones(1), np.zeros(1), None, 0.0)
    assert issubclass(kind, AbstractERK)
    tableau: Any = kind.tableau
    a = _lower_triangle(tableau)
    return Tableau(a, tableau.b_sol, np.append(0.0, tableau.c), tableau.b_error, 0.0)


def _lower_triangle(tableau: ButcherTableau) -> np.ndarray:
    s = tableau.num_stages
    a = np.zeros((s, s))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : len(row)] = row
    return a


class DiagonalTableau(NamedTuple):
    """The stages of a step that depend each on those before and on itself, for one of
    the terms.

    - `a`, `b`, `c`: as usual, `a` strictly lower triangular.
    - `diagonal`: that of `a`; zero for explicit stages.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    diagonal: np.ndarray


def has_several_tableaus(kind: type[AbstractSolver]) -> bool:
    """Whether the stages are a tuple, of those of each of several terms."""
    return isinstance(getattr(kind, "tableau", None), MultiButcherTableau)


def steps_by_diagonal_tableaus(kind: type[AbstractSolver]) -> bool:
    """Whether solvers of this class step as their tableaus say: Runge-Kutta solvers,
    diagonally implicit ones too, that do not override how diffrax makes a step."""
    if issubclass(kind, ImplicitEuler):
        return kind.step is ImplicitEuler.step and kind.init is ImplicitEuler.init
    return (
        issubclass(kind, AbstractRungeKutta)
        and kind.step is AbstractRungeKutta.step
        and kind.init is AbstractRungeKutta.init
    )


def diagonal_tableaus_of(kind: type[AbstractSolver]) -> tuple[DiagonalTableau, ...]:
    """The tableaus of one of diffrax's Runge-Kutta solvers, or of [`diffrax.Euler`][] or
    [`diffrax.ImplicitEuler`][]: of each term, if they have one each."""
    if issubclass(kind, Euler | ImplicitEuler):
        end = np.ones(1) if issubclass(kind, ImplicitEuler) else np.zeros(1)
        return (DiagonalTableau(np.zeros((1, 1)), np.ones(1), end, end),)
    assert issubclass(kind, AbstractRungeKutta)
    tableau: Any = kind.tableau
    several = has_several_tableaus(kind)
    return tuple(map(_diagonal_tableau, tableau.tableaus if several else (tableau,)))


def _diagonal_tableau(tableau: ButcherTableau) -> DiagonalTableau:
    a, diagonal = _lower_triangle(tableau), tableau.a_diagonal
    c = np.append(tableau.c1 or 0.0, tableau.c)
    diagonal = np.zeros(len(a)) if diagonal is None else np.asarray(diagonal, float)
    return DiagonalTableau(a, tableau.b_sol, c, diagonal)


def tableau_of(kind: type[AbstractSolver]) -> Tableau:
    """The tableau without a last stage that the step itself has no use for."""
    full = full_tableau_of(kind)
    a, b, c, error, _ = full
    if error is not None and b[-1] == 0 and np.array_equal(a[-1], b):
        # The slope at the end of the step (FSAL), which the other base step starts
        # with.
        return Tableau(a[:-1, :-1], b[:-1], c[:-1], error[:-1], float(error[-1]))
    return full


def evaluate_stages(
    tableau: Tableau,
    terms: PyTree[AbstractTerm],
    t: RealScalarLike,
    h: RealScalarLike,
    y: Y,
    args: Args,
    control: PyTree,
) -> PyTree:
    """The vector field times the control at every stage of a step, along a leading
    axis. The vector field is traced once, and compiled for each stage: a loop that is
    not unrolled costs small fields more than they do, and more memory."""
    a, b, c = tableau.a, tableau.b, tableau.c

    def stage(stages, i_a_c):
        i, a, c = i_a_c
        y_stage = (y**ω + combine(a, stages) ** ω).ω
        k = terms.vf_prod(t + c * h, y_stage, args, control)
        return jtu.tree_map(lambda s, k: s.at[i].set(k), stages, k), None

    zeros = jtu.tree_map(lambda x: jnp.zeros((len(b), *x.shape), x.dtype), y)
    c = jnp.asarray(c, jnp.result_type(h))
    rows = (np.arange(len(b)), jnp.asarray(a), c)
    stages, _ = lax.scan(stage, zeros, rows, unroll=True)
    return stages
