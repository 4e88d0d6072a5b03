"""What a solver that is made of another one leaves to that."""

import equinox as eqx
from diffrax import AbstractSolver


class AbstractForwardingSolver(AbstractSolver):
    """Base class of solvers that make the steps of another one, with something besides:
    everything but `init` and `step` is what it is there."""

    solver: eqx.AbstractVar[AbstractSolver]

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)
