"""The lines of which a reversible step is made."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
from diffrax import AbstractTerm
from jaxtyping import PyTree

from ..._compat import ω
from ..._tree import zeros_of
from ..._types import Args


Substep: TypeAlias = PyTree


class State(eqx.Module):
    """What the updates of a step change.

    - `y`, `solver_state`: as in [`diffrax.AbstractSolver.step`][].
    - `sums`: what the updates add up on the side, from zero at the start of each step:
        the error estimate, the coefficients of the interpolant.
    """

    y: PyTree
    solver_state: PyTree
    sums: PyTree


class AbstractShift(eqx.Module):
    """A line that evaluates nothing: an affine map of the state and its inverse."""

    @abc.abstractmethod
    def write(
        self, terms: PyTree[AbstractTerm], state: State, substep: Substep
    ) -> State:
        """The new state. Affine in `state`."""

    @abc.abstractmethod
    def unwrite(
        self, terms: PyTree[AbstractTerm], state: State, substep: Substep
    ) -> State:
        """The inverse of `write`."""


class AbstractUpdate(eqx.Module):
    """One line of a reversible method,

    ```
    k = evaluate(read(state))
    state = write(state, k)
    ```

    in which `read` looks only at a part of the state that `write` leaves as it is, and
    `write` is affine in `state` and `k`. So `read` gives the same point afterwards, `k`
    can be computed again there, and `unwrite` undoes the line without solving anything.

    `substep` holds the coefficients of the line: its share of the step, its time.
    """

    @abc.abstractmethod
    def read(self, state: State) -> PyTree:
        """The point at which the vector field is to be evaluated."""

    @abc.abstractmethod
    def evaluate(
        self, terms: PyTree[AbstractTerm], args: Args, point: PyTree, substep: Substep
    ) -> PyTree:
        """Evaluates the vector field: the only expensive part, done once forward and
        once in the reverse sweep."""

    @abc.abstractmethod
    def write(self, state: State, k: PyTree, substep: Substep) -> State:
        """The new state. Affine in `state` and `k`."""

    @abc.abstractmethod
    def unwrite(self, state: State, k: PyTree, substep: Substep) -> State:
        """The inverse of `write`: the old state from the new one and the same `k`."""


Line: TypeAlias = AbstractShift | AbstractUpdate


def apply(line: Line, terms, args, state: State, substep: Substep) -> State:
    """The state after a line."""
    if isinstance(line, AbstractShift):
        return line.write(terms, state, substep)
    k = line.evaluate(terms, args, line.read(state), substep)
    return line.write(state, k, substep)


def undo(line: Line, terms, args, state: State, substep: Substep) -> State:
    """The state before a line."""
    if isinstance(line, AbstractShift):
        return line.unwrite(terms, state, substep)
    k = line.evaluate(terms, args, line.read(state), substep)
    return line.unwrite(state, k, substep)


def pull_back(
    line: Line,
    rebuild: Callable[[PyTree], tuple[PyTree[AbstractTerm], Args, Any, Any]],
    parameters: PyTree,
    state: State,
    cotangent: State,
    substep: Substep,
    with_substep: bool,
    batch: Any,
) -> tuple[State, State, PyTree, Substep]:
    """The state before a line, the cotangent of that state, the cotangent of the
    parameters (`None` if there is none), and that of the substep (`None` unless
    `with_substep`). One evaluation of the vector field and one vector-Jacobian product,
    which is the least that is possible without storing anything."""
    variables, fixed = eqx.partition(substep, with_substep and eqx.is_inexact_array)

    def shift(state, variables, parameters):
        terms, *_ = rebuild(parameters)
        return line.write(terms, state, eqx.combine(variables, fixed))

    def evaluate(where, parameters):
        point, variables = where
        terms, args, *_ = rebuild(parameters)
        assert isinstance(line, AbstractUpdate)
        return line.evaluate(terms, args, point, eqx.combine(variables, fixed))

    def write(state, variables, k):
        return line.write(state, k, eqx.combine(variables, fixed))

    if isinstance(line, AbstractShift):
        terms, *_ = rebuild(parameters)
        state = line.unwrite(terms, state, substep)
        if not with_substep:
            _, vjp = jax.vjp(lambda s: shift(s, variables, parameters), state)
            return state, *vjp(cotangent), None, None
        _, vjp = jax.vjp(shift, state, variables, parameters)
        cotangent, cotangent_substep, cotangent_parameters = vjp(cotangent)
        return state, cotangent, cotangent_parameters, cotangent_substep

    point, vjp_read = jax.vjp(line.read, state)
    where = (point, variables)
    # `write` is affine in `k`, so that its transpose is known before `k` is.
    zeros = zeros_of(evaluate, where, parameters)
    _, vjp_write = jax.vjp(lambda s, k: write(s, variables, k), state, zeros)
    cotangent_write, cotangent_k = vjp_write(cotangent)
    k, (cotangent_point, from_evaluate), cotangent_parameters = batch.pull_back(
        evaluate, where, parameters, cotangent_k
    )
    state = line.unwrite(state, k, substep)
    cotangent_substep = None
    if with_substep:
        _, vjp_write = jax.vjp(lambda v: write(state, v, k), variables)
        (from_write,) = vjp_write(cotangent)
        cotangent_substep = (from_write**ω + from_evaluate**ω).ω
    (cotangent_read,) = vjp_read(cotangent_point)
    cotangent = (cotangent_write**ω + cotangent_read**ω).ω
    return state, cotangent, cotangent_parameters, cotangent_substep
