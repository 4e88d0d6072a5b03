"""The updates of which a reversible step is made."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
from diffrax import AbstractTerm
from jaxtyping import PyTree

from ..._compat import ω
from ..._types import Args, DenseInfo, RealScalarLike, Y


class State(eqx.Module):
    """What the updates of a step change: `y` and `solver_state`, as in
    [`diffrax.AbstractSolver.step`][].

    ```python
    y, z = lambda s: s.y, lambda s: s.solver_state  # functions of a `State`
    Add(to=y, at=z, t=t0, control=terms.contr(t0, t1))
    ```
    """

    y: PyTree
    solver_state: PyTree


class AbstractUpdate(eqx.Module):
    """Base class of the updates of a reversible step. An update is

    ```
    k = evaluate(terms, args, read(state))
    state, contribution = write(state, k)
    ```

    in which `read` looks only at a part of the state that `write` leaves as it is. So
    `read` gives the same point afterwards, `k` can be computed again there, and
    `unwrite` undoes the update without solving anything.

    The arrays among the fields of an update are its coefficients: times, parts of the
    control, weights. They are differentiated.

    Most methods are made of [`diffrax_reversible.Add`][] alone.

    ```python
    class Scale(AbstractUpdate):  # y *= factor
        factor: Array
        ...
    ```

    **Cost** of the reverse sweep: one evaluation and one vector-Jacobian product. One
    more evaluation if `write` is not affine in `k`.
    """

    @abc.abstractmethod
    def read(self, state: State) -> PyTree:
        """The point at which the vector field is evaluated."""

    @abc.abstractmethod
    def evaluate(
        self, terms: PyTree[AbstractTerm], args: Args, point: PyTree
    ) -> PyTree:
        """Evaluates the vector field, or whatever else of the terms the update needs."""

    @abc.abstractmethod
    def write(self, state: State, k: PyTree) -> tuple[State, PyTree]:
        """The new state; and what the update contributes to the sums over the step of
        which the error estimate and the dense output are made (`None`: nothing)."""

    @abc.abstractmethod
    def unwrite(self, state: State, k: PyTree) -> State:
        """The inverse of `write`: the old state from the new one and the same `k`."""


class Add(AbstractUpdate):
    """The update `to += f(t, at) control`, of which most reversible methods are made.

    ```python
    y, z = lambda s: s.y, lambda s: s.solver_state
    Add(to=y, at=z, t=t0, control=terms.contr(t0, t1))
    ```

    **Arguments:**

    - `to`, `at`: functions of a [`diffrax_reversible.State`][]: the part that is changed,
        and the part at which the vector field is evaluated. If they overlap, a
        `ValueError` is raised where the update is differentiated.
    - `t`: the time at which the vector field is evaluated.
    - `control`: what it is multiplied with, as [`diffrax.AbstractTerm.contr`][] returns.
    - `term`: a function of the terms: the one to evaluate. Defaults to the identity.
    """

    to: Callable[[State], PyTree] = eqx.field(static=True)
    at: Callable[[State], PyTree] = eqx.field(static=True)
    t: PyTree
    control: PyTree
    term: Callable[[PyTree], Any] = eqx.field(static=True, default=lambda x: x)

    def read(self, state):
        return self.at(state)

    def evaluate(self, terms, args, point):
        return self.term(terms).vf_prod(self.t, point, args, self.control)

    def write(self, state, k):
        return eqx.tree_at(self.to, state, (self.to(state) ** ω + k**ω).ω), None

    def unwrite(self, state, k):
        return eqx.tree_at(self.to, state, (self.to(state) ** ω - k**ω).ω)


class Repeat(eqx.Module):
    """The same updates again and again, with other coefficients: a loop over the leading
    axis that all arrays in `updates` have. The vector field is compiled once.

    ```python
    weights = jnp.array([0.25, 0.5, 0.25])
    ts = t0 + jnp.cumsum(weights) * (t1 - t0)
    Repeat([Add(to=y, at=z, t=ts, control=weights * (t1 - t0))])
    ```
    """

    updates: Sequence[AbstractUpdate]


def linear(state0: State, state1: State, sums: PyTree) -> DenseInfo:
    """The `dense_info` of `diffrax.LocalLinearInterpolation`."""
    del sums
    return dict(y0=state0.y, y1=state1.y)


class Restart(NamedTuple):
    """When a solver restarts: makes its solver state anew, as `init` does.

    For a reversible solver with two copies of the solution, whose difference grows where
    the flow contracts. Not for a solver that has one copy, nor for Brownian motion, whose
    increments are no measure of an error. [`diffrax_reversible.ReversibleAdjoint`][] keeps
    the state before each restart.

    **Cost** of a restart: what `init` evaluates, and its vector-Jacobian product. Of a
    step without one: none.

    ```python
    difference = lambda state1, sums, memory: state1.solver_state - state1.y
    Step(updates, error, restart=Restart(difference, 0.05, order=2))
    ```

    - `difference`: the effect that the difference of the two copies of the solution has
        on the solution in one step, as a function of the state at the end of the step,
        of the sums, and of the memory of the step before. It should cost no evaluation.
    - `ratio`: a restart is due where the difference, multiplied by `e^(1 / order)`, is
        more than `ratio` times the error estimate. Here `e` is the error estimate relative
        to the solution. Its root is about `h a`, with the Lipschitz constant `a` of the
        vector field; and by that part of itself the difference changes the smooth part of
        the solution in one step. `None`: never.
    - `order`: that of the error estimate. `None`: without that factor.
    - `has_floor`: whether the difference is an estimate that is not zero where there is no
        difference. Then four times as much is allowed, until it has grown threefold since
        the last restart.
    - `memory`: makes the memory of the sums. Defaults to none.
    """

    difference: Callable[[State, PyTree, PyTree], Y]
    ratio: float | None
    order: RealScalarLike | None = None
    has_floor: bool = False
    memory: Callable[[PyTree], PyTree] = lambda _: None


class Step(NamedTuple):
    """A step of a reversible solver.

    - `updates`: in the order in which they are made.
    - `error`: makes the error estimate of the sums of what the updates have contributed.
        `None`: no estimate.
    - `dense_info`: makes the dense output, as a function of the states at both ends and
        of the sums. Defaults to that of `diffrax.LocalLinearInterpolation`.

    ```python
    def updates(self, terms, t0, t1, made_jump):
        y, z, dX = lambda s: s.y, lambda s: s.solver_state, terms.contr(t0, t1)
        return Step([Add(to=y, at=z, t=t0, control=dX), Add(to=z, at=y, t=t1, control=dX)])
    ```
    """

    updates: Sequence[AbstractUpdate | Repeat]
    error: Callable[[PyTree], Y] | None = None
    dense_info: Callable[[State, State, PyTree], DenseInfo] = linear
    restart: Restart | None = None
