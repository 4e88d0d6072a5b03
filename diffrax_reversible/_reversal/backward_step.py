"""The reversal of a solver that is known by its `backward_step` only."""

import equinox as eqx

from .base import AbstractReversal


class BackwardStepReversal(AbstractReversal):
    """Undoes a step by `backward_step`, and differentiates `step` at the state that was
    found. As exact as `backward_step` is.

    **Cost:** that of `backward_step`, and a vector-Jacobian product of `step`.
    """

    def undo(self, step, end):
        inputs, (y1, solver_state1, _) = step.inputs, end
        y0, dense_info, solver_state0, _ = inputs.solver.backward_step(  # pyright: ignore
            inputs.terms,
            inputs.t0,
            inputs.t1,
            y1,
            inputs.args,
            (step.t_previous,),
            solver_state1,
            step.made_jump,
        )
        return y0, solver_state0, dense_info

    def pull_back(self, step, end, cotangent, batch, total):
        y0, solver_state0, _ = self.undo(step, end)
        variables, fixed = eqx.partition(solver_state0, eqx.is_inexact_array)

        def forward(start, parameters):
            y0, variables = start
            inputs = step.inputs_of(parameters)
            y1, _, dense_info, solver_state1, _ = inputs.solver.step(
                inputs.terms,
                inputs.t0,
                inputs.t1,
                y0,
                inputs.args,
                eqx.combine(variables, fixed),
                step.made_jump,
            )
            if cotangent.dense_info is None:
                dense_info = None
            return eqx.filter((y1, solver_state1, dense_info), eqx.is_inexact_array)

        outputs = (cotangent.y, cotangent.solver_state, cotangent.dense_info)
        _, (cotangent_y, cotangent_solver_state), total = batch.vjp(
            forward, (y0, variables), step.parameters, outputs, total
        )
        return (y0, solver_state0), cotangent_y, cotangent_solver_state, total
