"""Reversible solvers and exact adjoint methods for `diffrax.diffeqsolve`.

The steps of a reversible solver can be undone, so `ReversibleAdjoint` differentiates a
solve in memory that does not grow with the number of steps. `SymplecticAdjoint` and
`InterpolatedAdjoint` do so for solvers that are not reversible.
"""

import importlib.metadata

from . import _citations as _citations
from ._adjoint import (
    InterpolatedAdjoint,
    ReversalReport,
    ReversibleAdjoint,
    SymplecticAdjoint,
)
from ._compare import AdjointFigures, compare_adjoints, Comparison
from ._controller import RecordedState, RecordedSteps, ReplayedSteps, StepRecord
from ._solver import (
    AbstractALFComposition,
    AbstractReversibleSolver,
    AbstractUpdate,
    AbstractUpdateSolver,
    Add,
    ALF,
    ALFComposition,
    EES25,
    EES27,
    Repeat,
    Restart,
    RestartState,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
    State,
    Step,
    StormerVerlet,
    SymplecticComposition4,
    SymplecticComposition6,
    SymplecticComposition8,
)


__version__ = importlib.metadata.version("diffrax_reversible")

__all__ = [
    "ALF",
    "ALFComposition",
    "AbstractALFComposition",
    "AbstractReversibleSolver",
    "AbstractUpdate",
    "AbstractUpdateSolver",
    "Add",
    "AdjointFigures",
    "Comparison",
    "EES25",
    "EES27",
    "InterpolatedAdjoint",
    "RecordedState",
    "RecordedSteps",
    "Repeat",
    "ReplayedSteps",
    "Restart",
    "RestartState",
    "ReversalReport",
    "Reversible",
    "ReversibleALF2",
    "ReversibleALF4",
    "ReversibleALF6",
    "ReversibleALF8",
    "ReversibleAdjoint",
    "ReversibleYoshida4",
    "ReversibleYoshida6",
    "ReversibleYoshida8",
    "State",
    "Step",
    "StepRecord",
    "StormerVerlet",
    "SymplecticAdjoint",
    "SymplecticComposition4",
    "SymplecticComposition6",
    "SymplecticComposition8",
    "compare_adjoints",
]
