from .interpolated.adjoint import InterpolatedAdjoint as InterpolatedAdjoint
from .reversible.adjoint import ReversibleAdjoint as ReversibleAdjoint
from .reversible.monitor import ReversalReport as ReversalReport
from .symplectic.adjoint import SymplecticAdjoint as SymplecticAdjoint
