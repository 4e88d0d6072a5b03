from .interpolated.adjoint import InterpolatedAdjoint as InterpolatedAdjoint
from .reversible.adjoint import ReversibleAdjoint as ReversibleAdjoint
from .symplectic.adjoint import SymplecticAdjoint as SymplecticAdjoint
