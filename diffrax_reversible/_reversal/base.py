"""What the reverse sweep needs to know of a solver: how to undo a step and pull it back."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import PyTree

from .._autodiff.batch import Batch
from .._types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    RealScalarLike,
    Y,
)


class StepInputs(eqx.Module):
    """All that a step depends on, besides the state at its start."""

    solver: AbstractSolver
    terms: PyTree[AbstractTerm]
    args: Args
    t0: RealScalarLike
    t1: RealScalarLike


@dataclasses.dataclass(frozen=True)
class ReverseStep:
    """The step that is to be undone.

    - `inputs_of`: makes its inputs of the parameters that are differentiated.
    - `parameters`: those.
    - `t_previous`: the start of the step before.
    - `made_jump`: whether the vector field jumped at its start; `False` itself if it
        never does.
    - `restarts`: whether it starts with a restart; `False` itself if no step does.
    - `number`: of the step, from 1.
    - `active`: `False` for an element of a batch that has no steps left; it must add
        nothing. `True` itself where there is no batch.
    """

    inputs_of: Callable[[PyTree], StepInputs]
    parameters: PyTree
    t_previous: RealScalarLike
    made_jump: BoolScalarLike
    restarts: BoolScalarLike
    number: IntScalarLike
    active: BoolScalarLike

    @property
    def inputs(self) -> StepInputs:
        return self.inputs_of(self.parameters)

    def interval(self, parameters: PyTree) -> tuple[RealScalarLike, RealScalarLike]:
        """The start and the end of the step."""
        inputs = self.inputs_of(parameters)
        return inputs.t0, inputs.t1


class Cotangent(eqx.Module):
    """The cotangent of what a step returns. `dense_info` is `None` if nothing was
    interpolated in the step."""

    y: Y
    solver_state: PyTree
    dense_info: DenseInfo | None


class End(NamedTuple):
    """The solution and the solver state at the end of a step; and what else was found on
    the way there that its pull-back needs."""

    y: Y
    solver_state: PyTree
    residual: Any = None


class AbstractReversal(eqx.Module):
    """How the steps of one kind of solver are undone and pulled back.

    The sweep carries the solution and the solver state at the end of a step, unless the
    subclass says otherwise.
    """

    def init_carry(
        self, terms: PyTree[AbstractTerm], t: RealScalarLike, y: Y, solver_state: PyTree
    ) -> Any:
        """What the sweep carries where it starts, for the solution and the solver state
        at `t`."""
        del terms, t
        return y, solver_state

    def end_of(self, step: ReverseStep, carry: Any) -> End:
        """The end of a step, from what the sweep carries there."""
        del step
        return End(*carry)

    def difference(self, before: tuple[Y, PyTree], after: tuple[Y, PyTree]) -> Y | None:
        """By how much the two copies of the solution differ, from the solution and the
        solver state before and after a step; `None` if the solver itself watches that,
        or carries only one."""
        del before, after
        return None

    @abc.abstractmethod
    def undo(self, step: ReverseStep, end: End) -> tuple[Y, PyTree, DenseInfo]:
        """Undoes a step: the solution and the solver state at its start, and its dense
        output. Where the step started with a restart, the state after that."""

    def dense_info(self, step: ReverseStep, end: End) -> DenseInfo:
        """The dense output of a step, from its end."""
        _, _, dense_info = self.undo(step, end)
        return dense_info

    @abc.abstractmethod
    def pull_back(
        self,
        step: ReverseStep,
        end: End,
        cotangent: Cotangent,
        batch: Batch,
        total: PyTree,
    ) -> tuple[Any, Y, PyTree, PyTree]:
        """Undoes a step and pulls it back.

        **Arguments:**

        - `end`: as `end_of` returns it.
        - `cotangent`: of what the step returns.
        - `total`: the cotangent of the parameters, which the step adds to.

        **Returns:** what the sweep carries at the start of the step; the cotangents of
        the solution and of the solver state there; the new `total`.
        """
