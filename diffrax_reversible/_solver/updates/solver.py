"""Reversible solvers that are made of updates."""

import abc
from collections.abc import Sequence

from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import PyTree

from ..._tree import add
from ..._types import (
    BoolScalarLike,
    RealScalarLike,
)
from ..base import AbstractReversibleSolver
from .repeat import repeat
from .restart import (
    copy_of,
    jumps_after,
    make_anew,
    restarted,
    RestartState,
    test_for_restart,
    with_copy,
)
from .update import AbstractUpdate, Repeat, State, Step


class AbstractUpdateSolver(AbstractReversibleSolver, AbstractAdaptiveSolver):
    """Base class of the reversible solvers that are made of updates, which can be undone
    one by one with one evaluation of the vector field each.

    A subclass says what its updates are, how they start, and its order; `step`,
    `backward_step` and their derivatives are written once. They must not be overridden:
    a subclass that does is refused by [`diffrax_reversible.ReversibleAdjoint`][].

    Arrays that are fields of the solver are differentiated.

    **Cost** of the reverse sweep: as many evaluations of the vector field as the solve
    took, and one vector-Jacobian product for each.

    ```python
    class CoupledEuler(AbstractUpdateSolver):
        ...

        def updates(self, terms, t0, t1, made_jump):
            y, z, dX = lambda s: s.y, lambda s: s.solver_state, terms.contr(t0, t1)
            return Step(
                [Add(to=y, at=z, t=t0, control=dX), Add(to=z, at=y, t=t1, control=dX)]
            )
    ```
    """

    @abc.abstractmethod
    def updates(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        made_jump: BoolScalarLike,
    ) -> Step:
        """The updates of a step from `t0` to `t1`, its error estimate and its dense
        output.

        **Arguments:** as [`diffrax.AbstractSolver.step`][]. `made_jump` is `False`
        itself, and not traced, where the vector field never jumps.

        **Returns:** a [`diffrax_reversible.Step`][].
        """

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """As [`diffrax.AbstractSolver.step`][]."""
        due = restarted(solver_state)
        restart = make_anew(self, t0, t1, due)
        state0 = State(y0, copy_of(solver_state))
        state0, _ = make(restart, terms, args, state0)
        step = self.updates(terms, t0, t1, jumps_after(due, made_jump))
        state1, sums = make(step.updates, terms, args, state0)
        y_error = None if step.error is None else step.error(sums)
        dense_info = step.dense_info(state0, state1, sums)
        new = state1.solver_state
        if type(solver_state) is RestartState:
            assert step.restart is not None
            new = test_for_restart(
                step.restart, solver_state, y0, state1, sums, y_error
            )
        return state1.y, y_error, dense_info, new, RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        """As [`diffrax_reversible.AbstractReversibleSolver.backward_step`][]. Where the
        step started with a restart, it leads to the state after that."""
        del ts_state
        step = self.updates(terms, t0, t1, made_jump)
        state1 = State(y1, copy_of(solver_state))
        state0, sums = undo(step.updates, terms, args, state1)
        dense_info = step.dense_info(state0, state1, sums)
        solver_state = with_copy(solver_state, state0.solver_state)
        return state0.y, dense_info, solver_state, RESULTS.successful


Updates = Sequence[AbstractUpdate | Repeat]


def make(updates: Updates, terms, args, state: State) -> tuple[State, PyTree]:
    """Makes the updates: the new state, and the sum of the contributions."""

    def forward(state, updates):
        sums = None
        for update in updates:
            k = update.evaluate(terms, args, update.read(state))
            state, contribution = update.write(state, k)
            sums = add(sums, contribution)
        return state, None, sums

    sums = None
    for update in updates:
        if isinstance(update, Repeat):
            state, _, contribution = repeat(forward, state, update.updates)
        else:
            state, _, contribution = forward(state, (update,))
        sums = add(sums, contribution)
    return state, sums


def undo(updates: Updates, terms, args, state: State) -> tuple[State, PyTree]:
    """The inverse of `make`: the old state, and the same sum of the contributions."""

    def backward(state, updates):
        sums = None
        for update in reversed(updates):
            k = update.evaluate(terms, args, update.read(state))
            state = update.unwrite(state, k)
            _, contribution = update.write(state, k)
            sums = add(sums, contribution)
        return state, None, sums

    sums = None
    for update in reversed(updates):
        if isinstance(update, Repeat):
            state, _, contribution = repeat(
                backward, state, update.updates, reverse=True
            )
        else:
            state, _, contribution = backward(state, (update,))
        sums = add(sums, contribution)
    return state, sums
