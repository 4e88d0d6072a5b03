from .reversible import ReversibleAdjoint as ReversibleAdjoint
