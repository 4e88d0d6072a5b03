from .interpolated import InterpolatedAdjoint as InterpolatedAdjoint
from .reversible import ReversibleAdjoint as ReversibleAdjoint
