from .alf.base import AbstractALFComposition as AbstractALFComposition
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
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .runge_kutta.coupling import Reversible as Reversible
from .runge_kutta.ees import EES25 as EES25, EES27 as EES27
from .symplectic.composition import (
    SymplecticComposition4 as SymplecticComposition4,
    SymplecticComposition6 as SymplecticComposition6,
    SymplecticComposition8 as SymplecticComposition8,
)
from .symplectic.stormer_verlet import StormerVerlet as StormerVerlet
from .updates.recorded import RecordedRestarts as RecordedRestarts
from .updates.restart import (
    RestartRecord as RestartRecord,
    RestartState as RestartState,
)
from .updates.solver import AbstractUpdateSolver as AbstractUpdateSolver
from .updates.update import (
    AbstractUpdate as AbstractUpdate,
    Add as Add,
    Repeat as Repeat,
    Restart as Restart,
    State as State,
    Step as Step,
)
