from .alf import AbstractALFComposition as AbstractALFComposition
from .alf_composition import ALFComposition as ALFComposition
from .alf_solvers import (
    ReversibleALF2 as ReversibleALF2,
    ReversibleALF4 as ReversibleALF4,
    ReversibleALF6 as ReversibleALF6,
    ReversibleALF8 as ReversibleALF8,
    ReversibleYoshida4 as ReversibleYoshida4,
    ReversibleYoshida6 as ReversibleYoshida6,
    ReversibleYoshida8 as ReversibleYoshida8,
)
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .grid import propose_grid as propose_grid
from .mali import ALF as ALF
from .registry import as_reversible as as_reversible
