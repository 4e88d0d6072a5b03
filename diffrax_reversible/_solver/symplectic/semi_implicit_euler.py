"""The updates of `diffrax.SemiImplicitEuler`."""

import numpy as np

from .base import AbstractSplitting, Moves


class SemiImplicitEulerUpdates(AbstractSplitting):
    """The updates of [`diffrax.SemiImplicitEuler`][]. Both terms are evaluated at the
    start of the step."""

    def order(self, terms):
        del terms
        return 1

    def moves(self):
        whole = Moves(np.ones(1), np.zeros(1))
        return whole, whole
