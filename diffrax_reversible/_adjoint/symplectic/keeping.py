"""Solvers that hand out what they found on the way of a step."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractSolver, RESULTS
from jaxtyping import PyTree

from ..._autodiff.linearisation import Linearisation
from ..._compat import unvmap_any, ω
from ..._reversal.base import StepInputs
from ..._reversal.failure import or_nan
from ..._reversal.stages import evaluate_linearised, no_stages
from ..._solver.forwarding import AbstractForwardingSolver
from ..._solver.runge_kutta.tableau import full_tableau_of
from ..._solver.updates.repeat import is_small
from ..._tree import combine, where
from ..._types import IntScalarLike, Y


class AbstractKeepingSolver(AbstractForwardingSolver):
    """A Runge-Kutta solver whose solver state also holds what it found in the last
    step."""

    def init(self, terms, t0, t1, y0, args):
        raise AssertionError("The solve has started already.")

    @abc.abstractmethod
    def nothing_kept(self, inputs: StepInputs, y: Y, solver_state: PyTree) -> PyTree:
        """What is kept of a step without length."""


class KeepsStages(AbstractKeepingSolver):
    """Keeps the stages."""

    solver: AbstractSolver

    def nothing_kept(self, inputs, y, solver_state):
        del inputs, solver_state
        return no_stages(type(self.solver), y)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        solver_state, _ = solver_state
        y1, y_error, dense_info, solver_state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        k = or_nan(result, dense_info["k"])
        return y1, y_error, dense_info, (solver_state, k), result


class KeepsResiduals(AbstractKeepingSolver):
    """Keeps the residuals of the vector field's derivative at every stage.

    - `linearisation`: of `evaluate_stage`.
    """

    solver: AbstractSolver
    linearisation: Linearisation = eqx.field(static=True)

    def nothing_kept(self, inputs, y, solver_state):
        number, f0 = len(full_tableau_of(type(self.solver)).b), None
        if solver_state is not None:
            _, f0 = solver_state
            number = number - 1
        start = jnp.zeros_like(inputs.t0)
        _, residuals = evaluate_linearised(self.linearisation, inputs, start, y)
        repeated = lambda x: jnp.broadcast_to(x, (number, *x.shape))
        return f0, jtu.tree_map(repeated, residuals)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        solver_state, _ = solver_state
        kind = type(self.solver)
        tableau = full_tableau_of(kind)
        a, c = jnp.asarray(tableau.a), jnp.asarray(tableau.c, jnp.result_type(t0, t1))
        inputs = StepInputs(self.solver, terms, args, t0, t1)
        k, f0, first = no_stages(kind, y0), None, 0
        if solver_state is not None:
            first_step, f0 = solver_state
            evaluates = jnp.asarray(first_step | made_jump)
            f0 = lax.cond(
                unvmap_any(evaluates),
                lambda: where(evaluates, terms.vf(t0, y0, args), f0),
                lambda: f0,
            )
            k0 = terms.prod(f0, terms.contr(t0, t1))
            k, first = _written(k, 0, k0), 1

        def stage(loop, i):
            k, _ = loop
            point = (y0**ω + combine(a[i], k) ** ω).ω
            (ki, f), residuals = evaluate_linearised(
                self.linearisation, inputs, c[i], point
            )
            return (_written(k, i, ki), f), residuals

        unroll = is_small(lambda loop: stage(loop, first), (k, f0))
        (k, f1), residuals = lax.scan(
            stage, (k, f0), np.arange(first, len(a)), unroll=unroll or 1
        )
        y1 = (y0**ω + combine(tableau.b, k) ** ω).ω
        dense_info, y_error = dict(y0=y0, y1=y1), None
        if tableau.error is not None:
            # All but Euler's method.
            dense_info, y_error = dict(dense_info, k=k), combine(tableau.error, k)
        if solver_state is not None:
            solver_state = (jnp.zeros_like(solver_state[0]), f1)
        kept = (f0, residuals)
        return y1, y_error, dense_info, (solver_state, kept), RESULTS.successful


def _written(k: PyTree, i: IntScalarLike, ki: PyTree) -> PyTree:
    return jtu.tree_map(lambda xs, x: xs.at[i].set(x), k, ki)
