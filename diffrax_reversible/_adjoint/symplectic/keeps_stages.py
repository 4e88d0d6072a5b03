"""A solver that hands out the stages of its steps."""

from diffrax import AbstractSolver, AbstractWrappedSolver


class KeepsStages(AbstractWrappedSolver):
    """A Runge-Kutta solver whose solver state also holds the stages of the last step."""

    solver: AbstractSolver

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

    def init(self, terms, t0, t1, y0, args):
        raise AssertionError("The solve has started already.")

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        solver_state, _ = solver_state
        y1, y_error, dense_info, solver_state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, y_error, dense_info, (solver_state, dense_info["k"]), result
