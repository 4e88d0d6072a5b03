"""Reversible solvers."""

import abc
from typing import ClassVar

from diffrax import AbstractSolver, AbstractTerm, RESULTS
from jaxtyping import PyTree

from .._types import Args, BoolScalarLike, DenseInfo, FloatScalarLike, RealScalarLike, Y


class AbstractReversibleSolver(AbstractSolver):
    """Base class of the solvers whose steps can be undone.
    [`diffrax_reversible.ReversibleAdjoint`][] differentiates their solves without
    storing them.

    A subclass has the methods of a [`diffrax.AbstractSolver`][] and `backward_step`. It
    is differentiated by undoing a step, and differentiating it at the state that was
    found. A solver that is made of updates should subclass
    [`diffrax_reversible.AbstractUpdateSolver`][] instead, which saves one evaluation of
    the step.

    **Cost** of the reverse sweep: that of `backward_step` and of `step`, and the
    vector-Jacobian product of `step`. A gradient is as exact as `backward_step` is.

    A solver that is undone only nearly sets `reversal_rtol`, the `reversal_rtol` of
    `ReversibleAdjoint` that its gradients are good for; [`diffrax_reversible.undo`][]
    then corrects what `backward_step` finds. One that is made of another
    solver, and whose `backward_step` undoes the restarts of that, too, sets
    `undoes_restarts`.

    ```python
    class MySolver(AbstractReversibleSolver):
        def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
            ...
    ```
    """

    reversal_rtol: ClassVar[float | None] = None
    undoes_restarts: ClassVar[bool] = False

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
        """Undoes a step: the inverse of [`diffrax.AbstractSolver.step`][].

        **Arguments:** as [`diffrax.AbstractSolver.step`][], and

        - `y1`: the solution at `t1`.
        - `ts_state`: the start of the previous step, as a tuple `(t,)`.
        - `solver_state`: the solver state at `t1`.

        **Returns:** the solution at `t0`; the `dense_info` of the step; the solver state
        at `t0`; a [`diffrax.RESULTS`][].
        """
