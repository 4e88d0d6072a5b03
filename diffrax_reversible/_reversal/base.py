"""What undoes the steps of a solver and pulls them back."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from diffrax import AbstractTerm, RESULTS
from jaxtyping import PyTree

from .._compat import ω
from .._solver.updates.solver import AbstractReversibleSolver
from .._types import Args, BoolScalarLike, DenseInfo, FloatScalarLike, RealScalarLike, Y


Rebuild = Callable[
    [PyTree], tuple[PyTree[AbstractTerm], Args, RealScalarLike, RealScalarLike]
]


class AbstractReversal(eqx.Module):
    """What the reverse sweep needs to know of a solver."""

    def depart(
        self,
        terms: PyTree[AbstractTerm],
        t: RealScalarLike,
        y: Y,
        solver_state: PyTree,
    ) -> tuple[Y, PyTree]:
        """What the sweep carries, instead of the solution and the solver state at `t`,
        where it starts."""
        del terms, t
        return y, solver_state

    def arrive(
        self, rebuild: Rebuild, parameters: PyTree, y: Y, solver_state: PyTree
    ) -> tuple[Y, PyTree]:
        """The solution and the solver state at the end of a step, from what the sweep
        carries."""
        del rebuild, parameters
        return y, solver_state

    @abc.abstractmethod
    def backward_step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        ts_state: tuple[FloatScalarLike, ...],
        solver_state: PyTree,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, PyTree, RESULTS]:
        """See [`diffrax_reversible.AbstractReversibleSolver.backward_step`][]."""

    @abc.abstractmethod
    def pull_back_step(
        self,
        rebuild: Rebuild,
        parameters: PyTree,
        y1: Y,
        ts_state: tuple[FloatScalarLike, ...],
        solver_state: PyTree,
        made_jump: BoolScalarLike,
        cotangent_y: Y,
        cotangent_solver_state: PyTree,
        cotangent_dense_info: DenseInfo | None,
        batch: Any,
        cotangent_parameters: PyTree,
    ) -> tuple[Y, PyTree, Y, PyTree, PyTree]:
        """See [`diffrax_reversible.AbstractReversibleSolver.pull_back_step`][], except
        that it takes the solution and the solver state from `arrive`, and returns what
        the sweep is to carry."""


class UpdatesReversal(AbstractReversal):
    """The reverse of a solver that is made of updates."""

    solver: AbstractReversibleSolver

    # One after the other, as they are.
    def backward_step(self, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.backward_step(*args)

    def pull_back_step(self, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.pull_back_step(*args)


def add(*trees: PyTree) -> PyTree:
    """The sum; `None` counts as zero."""
    total, *rest = [x for x in trees if x is not None]
    for x in rest:
        total = (total**ω + x**ω).ω
    return total


def vjp_with(fn: Callable, parameters: PyTree, with_parameters: bool, *primals):
    """`jax.vjp` of `fn(parameters, *primals)`. The cotangent of the parameters comes
    first, and is `None` unless `with_parameters`."""
    if with_parameters:
        return jax.vjp(fn, parameters, *primals)
    out, vjp = jax.vjp(lambda *primals: fn(parameters, *primals), *primals)
    return out, lambda cotangent: (None, *vjp(cotangent))
