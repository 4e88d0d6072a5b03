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
from .coupling import Reversible as Reversible
from .ees import EES25 as EES25, EES27 as EES27
from .grid import propose_grid as propose_grid
from .mali import ALF as ALF
from .registry import as_reversible as as_reversible
from .reversal import AbstractReversal as AbstractReversal, Rebuild as Rebuild
from .runge_kutta import (
    combine as combine,
    full_tableau_of as full_tableau_of,
    with_differentiable_stages as with_differentiable_stages,
)
from .sde import refuse_sde as refuse_sde, refuse_unsafe_sde as refuse_unsafe_sde
from .symplectic_composition import SymplecticComposition as SymplecticComposition
from .update import (
    AbstractShift as AbstractShift,
    AbstractUpdate as AbstractUpdate,
    State as State,
)
from .verlet import StormerVerlet as StormerVerlet
from .zeros import zeros_of as zeros_of
