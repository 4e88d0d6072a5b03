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
    RecordedRestarts,
    Repeat,
    Restart,
    RestartRecord,
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
from ._undo import decode, encode, Encoding, undo


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
    "Encoding",
    "InterpolatedAdjoint",
    "RecordedRestarts",
    "RecordedState",
    "RecordedSteps",
    "Repeat",
    "ReplayedSteps",
    "Restart",
    "RestartRecord",
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
    "decode",
    "encode",
    "undo",
]
