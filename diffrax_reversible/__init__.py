from . import _citations as _citations
from ._adjoint import (
    InterpolatedAdjoint as InterpolatedAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    SymplecticAdjoint as SymplecticAdjoint,
)
from ._controller import (
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    ReplayedSteps as ReplayedSteps,
    StepRecord as StepRecord,
)
from ._solver import (
    AbstractALFComposition as AbstractALFComposition,
    AbstractReversibleSolver as AbstractReversibleSolver,
    AbstractShift as AbstractShift,
    AbstractUpdate as AbstractUpdate,
    ALF as ALF,
    ALFComposition as ALFComposition,
    EES25 as EES25,
    EES27 as EES27,
    propose_grid as propose_grid,
    Reversible as Reversible,
    ReversibleALF2 as ReversibleALF2,
    ReversibleALF4 as ReversibleALF4,
    ReversibleALF6 as ReversibleALF6,
    ReversibleALF8 as ReversibleALF8,
    ReversibleYoshida4 as ReversibleYoshida4,
    ReversibleYoshida6 as ReversibleYoshida6,
    ReversibleYoshida8 as ReversibleYoshida8,
    State as State,
    StormerVerlet as StormerVerlet,
    SymplecticComposition as SymplecticComposition,
)
