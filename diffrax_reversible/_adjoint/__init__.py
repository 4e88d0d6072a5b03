from .interpolated import InterpolatedAdjoint as InterpolatedAdjoint
from .reversible import ReversibleAdjoint as ReversibleAdjoint
from .symplectic import SymplecticAdjoint as SymplecticAdjoint
