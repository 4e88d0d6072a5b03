"""Dense output that is as accurate as the steps: a shorter step to each save time."""

from collections.abc import Callable
from typing import Any

from diffrax import AbstractLocalInterpolation
from jaxtyping import PyTree

from ..._compat import ω
from ..._types import RealScalarLike, Y


class NotKept:
    """A function of the traced values of a step: a leaf that is handed on within the
    step, and that no buffer can hold."""

    def __init__(self, call: Callable):
        self.call = call

    @property
    def shape(self):
        # diffrax asks for it to allocate what it keeps of every step.
        raise NotImplementedError(
            "`interpolation='side_step'` evaluates the vector field at the save times "
            "of a solve, and leaves nothing to evaluate later: it does not support "
            "`SaveAt(dense=True)` and `diffeqsolve(..., event=...)`. Use "
            "`interpolation=None` with these."
        )


class SideStepInterpolation(AbstractLocalInterpolation):
    """The solution inside a step by a shorter step of the same method from the same
    start. Each time it is evaluated costs the evaluations of a step."""

    t0: RealScalarLike  # pyright: ignore
    t1: RealScalarLike  # pyright: ignore
    y0: Y
    solver_state: PyTree
    side_step: Any

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree:
        del left
        if t1 is not None:
            return (self.evaluate(t1) ** ω - self.evaluate(t0) ** ω).ω
        return self.side_step.call(self.t0, t0, self.y0, self.solver_state)
