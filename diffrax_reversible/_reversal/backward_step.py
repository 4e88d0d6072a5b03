"""The reverse of a solver that only knows how to step back."""

from typing import Any

import equinox as eqx

from .base import AbstractReversal


class StepReversal(AbstractReversal):
    """The reverse of any solver with a `backward_step`: goes back, and differentiates
    the step from there. As exact as `backward_step` is.

    **Cost:** that of `backward_step`, and a vector-Jacobian product of `step`.
    """

    solver: Any

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        return self.solver.backward_step(
            terms, t0, t1, y1, args, ts_state, solver_state, made_jump
        )

    def pull_back_step(
        self,
        rebuild,
        parameters,
        y1,
        ts_state,
        solver_state,
        made_jump,
        cotangent_y,
        cotangent_solver_state,
        cotangent_dense_info,
        batch,
        cotangent_parameters,
    ):
        terms, args, t0, t1 = rebuild(parameters)
        y0, _, solver_state0, _ = self.backward_step(
            terms, t0, t1, y1, args, ts_state, solver_state, made_jump
        )
        variables, fixed = eqx.partition(solver_state0, eqx.is_inexact_array)

        def step(start, parameters):
            y0, variables = start
            terms, args, t0, t1 = rebuild(parameters)
            solver_state0 = eqx.combine(variables, fixed)
            y1, _, dense_info, solver_state1, _ = self.solver.step(
                terms, t0, t1, y0, args, solver_state0, made_jump
            )
            solver_state1 = eqx.filter(solver_state1, eqx.is_inexact_array)
            dense_info = None if cotangent_dense_info is None else dense_info
            return y1, solver_state1, dense_info

        _, cotangents, increment = batch.pull_back(
            step,
            (y0, variables),
            parameters,
            (cotangent_y, cotangent_solver_state, cotangent_dense_info),
        )
        return (
            y0,
            solver_state0,
            *cotangents,
            batch.accumulate(cotangent_parameters, increment),
        )
