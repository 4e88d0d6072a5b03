"""Which solvers and adjoints are timed on which problems, and with how many steps."""

from typing import NamedTuple

import diffrax
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    SymplecticAdjoint,
)

from .problems import (
    BURGERS,
    CONVOLUTION,
    MLP,
    num_bytes,
    PROBLEMS,
    residual_bytes,
    shapes,
    SMALL,
    WIDE,
)


class Method(NamedTuple):
    """A solver and an adjoint. `checkpoints` are those of `RecursiveCheckpointAdjoint`:
    a number, or `None` for the default, or "all" for every step."""

    solver_name: str
    solver: diffrax.AbstractSolver
    adjoint_cls: type[diffrax.AbstractAdjoint]
    checkpoints: int | str | None = None

    def adjoint(self, max_steps):
        if self.checkpoints is None:
            return self.adjoint_cls()
        checkpoints = max_steps if self.checkpoints == "all" else self.checkpoints
        return self.adjoint_cls(checkpoints=checkpoints)

    @property
    def is_own(self):
        """Whether the adjoint is ours."""
        return self.adjoint_cls in (ReversibleAdjoint, SymplecticAdjoint)

    @property
    def adjoint_name(self):
        name = self.adjoint_cls.__name__
        return name if self.checkpoints is None else f"{name}({self.checkpoints})"


_own_solvers = {
    "ReversibleALF2": ReversibleALF2(),
    "ReversibleALF4": ReversibleALF4(),
    "ReversibleALF6": ReversibleALF6(),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5()),
}
_diffrax_solvers = {
    "Tsit5": diffrax.Tsit5(),
    "Dopri5": diffrax.Dopri5(),
    "Midpoint": diffrax.Midpoint(),
}
_checkpointed = diffrax.RecursiveCheckpointAdjoint

_symplectic = Method("Tsit5", diffrax.Tsit5(), SymplecticAdjoint)
_ours = [Method(*item, ReversibleAdjoint) for item in _own_solvers.items()]
_same_solver = [Method(*item, _checkpointed) for item in _own_solvers.items()]
_theirs = {
    name: [
        *(Method(name, solver, _checkpointed, k) for k in (None, 2, 8, 32, "all")),
        Method(name, solver, diffrax.BacksolveAdjoint),
        Method(name, solver, diffrax.DirectAdjoint),
    ]
    for name, solver in _diffrax_solvers.items()
}
METHODS = [*_ours, _symplectic, *_same_solver, *sum(_theirs.values(), [])]


#
# What is a test at all, and what is a quick one
#

_budget_bytes = 2**30
# Loops of diffrax with `DirectAdjoint` are split into loops of 16, of steps as of stages,
# and only innermost ones remember what they evaluate.
_direct_loop = 16


def _estimated_bytes(problem, steps, method):
    """Of what grows with the number of steps or is remembered of many evaluations."""
    state = num_bytes(shapes(problem)[0])
    if method.adjoint_cls is diffrax.DirectAdjoint:
        return min(steps, _direct_loop) * _direct_loop * residual_bytes(problem)
    elif method.adjoint_cls is SymplecticAdjoint:
        return steps * state
    elif method.checkpoints == "all":
        # The state and the last evaluation, which is the first one of the next step.
        return 2 * steps * state
    else:
        return 0


def _steps_are_many(problem, steps, method):
    """Whether few checkpoints make a test of hours."""
    return method.checkpoints == 2 and steps > (100 if problem.batched else 1000)


_default, _, _eight, _, _all, _backsolve, _direct = _theirs["Tsit5"]
_others = [_theirs["Dopri5"][0], _theirs["Midpoint"][0]]
_few = [*_ours[:2], *_same_solver[:2], _symplectic, _default]
_some = [*_few, *_ours[2:], _backsolve]
_more = [*_some, _eight, _all, _direct, *_others]
_many = [*_ours, *_same_solver, _symplectic, *_theirs["Tsit5"], *_others]
# One solver shows how memory depends on the number of steps.
_memory = [_ours[0], _same_solver[0]]

# For each problem and number of steps: the methods of the quick run, and of the whole.
_selection = {
    (SMALL, 100): (_some, METHODS),
    (SMALL, 1000): (_more, METHODS),
    (SMALL, 10_000): (_some, METHODS),
    (BURGERS, 100): (_few, METHODS),
    (BURGERS, 1000): (_few, _many),
    (BURGERS, 10_000): ([], _some),
    (MLP, 100): (_some, METHODS),
    (CONVOLUTION, 100): (_few, _many),
    (WIDE, 100): (_few, _many),
    **{(p, 1000): ([], _few) for p in (MLP, CONVOLUTION, WIDE)},
    **{(p, 10_000): ([], _memory) for p in (MLP, CONVOLUTION, WIDE)},
}


def _case(problem, what, method, quick):
    name = f"{problem.name}-{what}-{method.solver_name}-{method.adjoint_name}"
    return (name, () if quick else (pytest.mark.slow,))


def constant_step_cases():
    """`(problem, steps, method)` as parameters of a test."""
    for (problem, steps), (quick, whole) in _selection.items():
        for method in whole:
            size = _estimated_bytes(problem, steps, method)
            if size > _budget_bytes or _steps_are_many(problem, steps, method):
                continue
            name, marks = _case(problem, f"{steps}-steps", method, method in quick)
            yield pytest.param(problem, steps, method, id=name, marks=marks)


def adaptive_cases():
    """`(problem, method)` as parameters of a test."""
    for problem in PROBLEMS:
        if not problem.batched:
            continue
        for method in [*_few, _backsolve]:
            y0, params = shapes(problem)
            # diffrax's adjoints keep a cotangent of the parameters for each solve, and
            # one more to add to it.
            size = 2 * y0.shape[0] * num_bytes(params)
            if not method.is_own and size > _budget_bytes:
                continue
            quick = problem is MLP and method in _few
            name, marks = _case(problem, "PID", method, quick)
            yield pytest.param(problem, method, id=name, marks=marks)
