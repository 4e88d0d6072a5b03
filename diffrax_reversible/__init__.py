from . import _citations as _citations
from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._controller import (
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    ReplayedSteps as ReplayedSteps,
    StepRecord as StepRecord,
)
from ._solver import (
    AbstractALFComposition as AbstractALFComposition,
    AbstractReversibleSolver as AbstractReversibleSolver,
    ALFComposition as ALFComposition,
    EES25 as EES25,
    EES27 as EES27,
    Reversible as Reversible,
    ReversibleALF2 as ReversibleALF2,
    ReversibleALF4 as ReversibleALF4,
    ReversibleYoshida4 as ReversibleYoshida4,
    StormerVerlet as StormerVerlet,
    SymplecticComposition as SymplecticComposition,
)
