from .alf.base import AbstractALFComposition as AbstractALFComposition
from .alf.grid import propose_grid as propose_grid
from .alf.mali import ALF as ALF
from .alf.named import (
    ReversibleALF2 as ReversibleALF2,
    ReversibleALF4 as ReversibleALF4,
    ReversibleALF6 as ReversibleALF6,
    ReversibleALF8 as ReversibleALF8,
    ReversibleYoshida4 as ReversibleYoshida4,
    ReversibleYoshida6 as ReversibleYoshida6,
    ReversibleYoshida8 as ReversibleYoshida8,
)
from .alf.own import ALFComposition as ALFComposition
from .runge_kutta.coupling import Reversible as Reversible
from .runge_kutta.ees import EES25 as EES25, EES27 as EES27
from .runge_kutta.tableau import (
    combine as combine,
    full_tableau_of as full_tableau_of,
    with_differentiable_stages as with_differentiable_stages,
)
from .symplectic.composition import SymplecticComposition as SymplecticComposition
from .symplectic.stormer_verlet import StormerVerlet as StormerVerlet
from .updates.solver import AbstractReversibleSolver as AbstractReversibleSolver
from .updates.update import (
    AbstractShift as AbstractShift,
    AbstractUpdate as AbstractUpdate,
    State as State,
)
