"""The named compositions of asynchronous-leapfrog steps, and those of users."""

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
from diffrax import AbstractStratonovichSolver, AbstractTerm
from jaxtyping import PyTree

from .alf import AbstractALFComposition, Interpolation
from .coefficients_high import (
    BLANES_MOAN6,
    KAHAN_LI8,
    SOFRONIOU_SPALETTA8,
    YOSHIDA6,
)
from .coefficients_low import ALF2, ALF4, YOSHIDA4
from .composition import check_composition, Composition


class ReversibleALF2(AbstractALFComposition, AbstractStratonovichSolver):
    composition: ClassVar[Composition] = ALF2

    def strong_order(self, terms: PyTree[AbstractTerm]) -> float:
        del terms
        return 0.5


class ReversibleALF4(AbstractALFComposition):
    composition: ClassVar[Composition] = ALF4


class ReversibleALF6(AbstractALFComposition):
    composition: ClassVar[Composition] = BLANES_MOAN6


class ReversibleALF8(AbstractALFComposition):
    composition: ClassVar[Composition] = SOFRONIOU_SPALETTA8


class ReversibleYoshida4(AbstractALFComposition):
    composition: ClassVar[Composition] = YOSHIDA4


class ReversibleYoshida6(AbstractALFComposition):
    composition: ClassVar[Composition] = YOSHIDA6


class ReversibleYoshida8(AbstractALFComposition):
    composition: ClassVar[Composition] = KAHAN_LI8


class ALFComposition(AbstractALFComposition):
    composition: Composition = eqx.field(static=True)

    def __init__(
        self,
        fractions: Sequence[float],
        order: int,
        error_weights: Sequence[float] | None = None,
        error_order: int | None = None,
        interpolant: Sequence[Sequence[float]] | None = None,
        *,
        damping: float = 0.0,
        grid: float | None = None,
        interpolation: Interpolation | None = None,
    ):
        self.composition = Composition(
            order=order,
            fractions=_floats(fractions),
            error_weights=None if error_weights is None else _floats(error_weights),
            error_order=error_order,
            source="",
            interpolant=(
                None
                if interpolant is None
                else tuple(_floats(row) for row in interpolant)
            ),
        )
        check_composition(self.composition)
        self.damping = damping
        self.grid = grid
        self.interpolation = interpolation


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
