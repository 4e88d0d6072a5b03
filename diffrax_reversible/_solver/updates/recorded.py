"""A solver that keeps what its restarts forget, and one that does not restart."""

from typing import Any, cast

import equinox as eqx
from diffrax import AbstractSolver

from ..._checks import check_integer
from ..forwarding import AbstractForwardingSolver
from .restart import RestartRecord, RestartState
from .solver import AbstractUpdateSolver


class AbstractSameUpdates(AbstractForwardingSolver, AbstractUpdateSolver):
    """Base class of solvers with the updates of another one, and another solver state to
    start with."""

    solver: eqx.AbstractVar[AbstractUpdateSolver]

    def updates(self, terms, t0, t1, made_jump):
        return self.solver.updates(terms, t0, t1, made_jump)


def _check(name: str, solver: Any) -> None:
    kind = type(solver)
    if not issubclass(kind, AbstractUpdateSolver) or not (
        kind.step is AbstractUpdateSolver.step
        and kind.backward_step is AbstractUpdateSolver.backward_step
    ):
        raise ValueError(
            f"`{name}({kind.__name__}())`: only a solver that is made of updates "
            "restarts, for example `ReversibleALF4()` or `Reversible(diffrax.Tsit5())`. "
            f"Use `{kind.__name__}` as it is."
        )


class RecordedRestarts(AbstractSameUpdates):
    """Wraps a solver that restarts, and records the states before its restarts, so that
    [`diffrax_reversible.undo`][] can undo the solve.

    Where the flow contracts a solver like [`diffrax_reversible.ReversibleALF4`][] restarts
    now and then: it makes the second copy of the solution anew, and forgets the old one.
    What is forgotten cannot be undone, and is kept here, as part of the solver state:

    ```python
    solver = RecordedRestarts(ReversibleALF4(), capacity=32)
    solution = diffrax.diffeqsolve(
        ..., solver=solver, saveat=diffrax.SaveAt(t1=True, solver_state=True)
    )
    start = undo(..., solver, solution)
    ```

    The steps are those of the wrapped solver.
    [`diffrax_reversible.ReversibleAdjoint`][] keeps such states by itself: there is no need
    to wrap a solver for its sake. Do not wrap a solver that never restarts.

    **Cost:** that of the wrapped solver. Memory: `2 * capacity` states, which are copied in
    every step.

    **Raises:** `ValueError` for a solver that is not made of updates. If there are more
    restarts than `capacity`, `undo` raises at run time, and says how many; the solve does
    not.
    """

    solver: AbstractUpdateSolver
    capacity: int = eqx.field(static=True)

    def __init__(self, solver: AbstractSolver, capacity: int = 32):
        _check("RecordedRestarts", solver)
        check_integer("RecordedRestarts", "capacity", capacity)
        self.solver = cast(AbstractUpdateSolver, solver)
        self.capacity = capacity

    def init(self, terms, t0, t1, y0, args):
        """As [`diffrax.AbstractSolver.init`][]."""
        state = self.solver.init(terms, t0, t1, y0, args)
        if type(state) is not RestartState or not state.restarts:
            return state
        record = RestartRecord.empty(self.capacity, y0, state.copy)
        is_none = lambda x: x is None
        return eqx.tree_at(lambda s: s.record, state, record, is_leaf=is_none)


RecordedRestarts.__init__.__doc__ = """**Arguments:**

- `solver`: The solver to wrap.
- `capacity`: The largest number of restarts that there is room for.
"""


class WithoutRestarts(AbstractSameUpdates):
    """The same solver, which never restarts, whatever its error estimate."""

    solver: AbstractUpdateSolver

    def init(self, terms, t0, t1, y0, args):
        state = self.solver.init(terms, t0, t1, y0, args)
        if type(state) is not RestartState:
            return state
        parts = (state.copy, state.due, state.largest, state.first, state.memory)
        return RestartState(*parts, restarts=False, age=state.age)


def without_restarts(solver: Any) -> Any:
    """A solver with the same steps, which never restarts."""
    if not issubclass(type(solver), AbstractUpdateSolver):
        return solver
    return WithoutRestarts(solver)
