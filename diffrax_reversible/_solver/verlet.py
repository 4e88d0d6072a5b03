"""The Stormer-Verlet method."""

from typing import ClassVar

from .coefficients_low import ALF2
from .composition import Composition
from .symplectic_composition import AbstractSymplecticComposition


class StormerVerlet(AbstractSymplecticComposition):
    composition: ClassVar[Composition] = ALF2
