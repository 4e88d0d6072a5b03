"""The Stormer-Verlet method."""

from typing import ClassVar

from .composition import ALF2, Composition
from .symplectic_composition import AbstractSymplecticComposition


class StormerVerlet(AbstractSymplecticComposition):
    composition: ClassVar[Composition] = ALF2
