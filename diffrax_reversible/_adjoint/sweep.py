"""The reverse sweep: walks the accepted steps of a solve backwards."""

from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, PyTree

from .._controller import Steps
from .._solver import as_reversible
from .._types import IntScalarLike, RealScalarLike
from .abstract_sweep import AbstractSweep, Batch, Inputs
from .accuracy import check, OnInaccurate, reversal_loss
from .checkpoints import Checkpoints
from .problem import differentiated, is_none, join, run, save_states
from .saves import Cursor, Step
from .step_back import StepBack, where


class _Walk(eqx.Module):
    """- `loss`, `t_loss`: the largest loss of the reversal so far, and where it was."""

    remaining: IntScalarLike
    cursors: list[Cursor]
    y: PyTree
    solver_state: PyTree
    cotangent_y: PyTree
    cotangent_solver_state: PyTree
    loss: Array
    t_loss: RealScalarLike


class ReversibleSweep(AbstractSweep):
    """The loop of a solve and its reverse: every step is undone, and pulled back at the
    state that was found.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `slots`: for checkpoints.
    - `rtol`, `on_inaccurate`: what loss to accept, and what to do about a larger one.
    """

    refusal = (
        "`adjoint=ReversibleAdjoint()` does not differentiate with respect to a value "
        "that a callable closes over, other than the vector field and "
        "`SaveAt(fn=...)`. Pass it through `args`, or make the callable an "
        "`equinox.Module` of which it is a field; or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )

    def __init__(
        self,
        loop: Callable,
        static: PyTree,
        slots: int | None,
        rtol: float,
        on_inaccurate: OnInaccurate,
    ):
        self.loop = loop
        self.static = static
        self.slots = slots
        self.rtol = rtol
        self.on_inaccurate: OnInaccurate = on_inaccurate

    def evaluate(self, inputs: Inputs) -> PyTree:
        problem = join(inputs, self.static)
        checkpoints = None
        if self.slots is not None:
            state = (problem.state.y, problem.state.solver_state)
            checkpoints = Checkpoints.empty(self.slots, state)
        return run(self.loop, problem, checkpoints)

    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> _Walk:
        problem = join(inputs, self.static)
        final, _ = outputs
        cotangent, _ = cotangents
        cursors = [Cursor(s.save_index, s.saveat_ts_index) for s in save_states(final)]
        return _Walk(
            final.num_accepted_steps,
            cursors,
            *as_reversible(problem.solver).depart(
                problem.parameters.terms, final.tprev, final.y, final.solver_state
            ),
            cotangent.y,
            cotangent.solver_state,
            jnp.zeros((), jnp.finfo(jnp.result_type(*jtu.tree_leaves(final.y))).dtype),
            final.tprev,
        )

    def active(self, carry: _Walk) -> Bool[ArrayLike, "..."]:
        return carry.remaining > 0

    def step(
        self,
        inputs: Inputs,
        outputs: PyTree,
        cotangents: PyTree,
        carry: _Walk,
        cotangent_parameters: PyTree,
        batch: Batch,
    ) -> tuple[_Walk, PyTree]:
        problem = join(inputs, self.static)
        solver = as_reversible(problem.solver)
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, cotangent_parameters, inputs.parameters, is_leaf=is_none
        )
        rebuild = lambda parameters: eqx.combine(parameters, problem.parameters)
        final, checkpoints = outputs
        cotangent, _ = cotangents
        step = self._current_step(problem, rebuild, final, carry, batch, parameters)
        carried = (carry.y, carry.solver_state)
        back = StepBack(
            problem, solver, rebuild, parameters, step, final, cotangent, carried, batch
        )
        cotangent_y, cotangent_solver_state = where(
            step.active, (carry.cotangent_y, carry.cotangent_solver_state), 0
        )
        total, cursors = back.end((cotangent_y, cotangent_parameters), carry.cursors)
        cotangent_y, cotangent_parameters = total
        cotangent_dense_info, cotangent_parameters, cursors = back.inside(
            cotangent_parameters, cursors
        )
        y, solver_state, *state, cotangent_parameters = back.itself(
            cotangent_y,
            cotangent_solver_state,
            cotangent_dense_info,
            cotangent_parameters,
        )
        total, cursors = back.start(
            (y, solver_state), (tuple(state), cotangent_parameters), cursors
        )
        (cotangent_y, cotangent_solver_state), cotangent_parameters = total

        loss, t_loss = carry.loss, carry.t_loss
        if checkpoints is not None:
            found, known = checkpoints.find(step.number - 1)

            def restart():
                y0 = self._arrived(problem, step.t0, y, solver_state)
                terms = problem.parameters.terms
                departure = solver.depart(terms, step.t0, *known)
                return departure, reversal_loss(y0, known[0], final.y)

            (y, solver_state), new_loss = lax.cond(
                batch.any(found),
                lambda: where(found, restart(), ((y, solver_state), 0 * loss)),
                lambda: ((y, solver_state), 0 * loss),
            )
            t_loss = jnp.where(new_loss > loss, step.t0, t_loss)
            loss = jnp.where(new_loss > loss, new_loss, loss)
        new = _Walk(
            carry.remaining - 1,
            cursors,
            y,
            solver_state,
            cotangent_y,
            cotangent_solver_state,
            loss,
            t_loss,
        )
        return where(step.active, new, carry), cotangent_parameters

    def finish(
        self, inputs: Inputs, outputs: PyTree, cotangents: PyTree, carry: _Walk
    ) -> tuple[PyTree, Bool[Array, ""]]:
        final, _ = outputs
        known, *_ = inputs.state
        problem = join(inputs, self.static)
        t0 = problem.parameters.span.t0
        y0 = self._arrived(problem, t0, carry.y, carry.solver_state)
        loss = reversal_loss(y0, known, final.y)
        worse = ~(loss <= carry.loss)
        t_loss = jnp.where(worse, t0, carry.t_loss)
        loss = jnp.where(worse, loss, carry.loss)
        trusted = check(loss, t_loss, self.rtol, self.on_inaccurate)
        _, _, *buffers = differentiated(cotangents[0])
        state = (carry.cotangent_y, carry.cotangent_solver_state, *buffers)
        return state, trusted

    @staticmethod
    def _arrived(problem, t, y, solver_state):
        """The solution at `t`, from what the walk carries there."""
        terms, args = problem.parameters.terms, problem.parameters.args
        rebuild = lambda _: (terms, args, t, t)
        y, _ = as_reversible(problem.solver).arrive(rebuild, None, y, solver_state)
        return y

    @staticmethod
    def _current_step(problem, rebuild, final, carry, batch, parameters) -> Step:
        # Outside a batch the loop ends when there is nothing left to walk.
        active = True if len(batch.names) == 0 else carry.remaining > 0
        number = carry.remaining if active is True else jnp.maximum(carry.remaining, 1)
        steps = Steps(
            problem.stepsize_controller,
            final.controller_state,
            final.num_accepted_steps,
            final.tprev,
            problem.state.made_jump,
        )

        def interval(parameters):
            span = rebuild(parameters).span
            t0, t1 = steps.interval(number - 1, span)
            if active is True:
                return t0, t1
            # A step of length zero is safe to evaluate, whatever the vector field.
            return jnp.where(active, t0, span.t0), jnp.where(active, t1, span.t0)

        t_previous, _ = steps.interval(
            jnp.maximum(number - 2, 0), rebuild(parameters).span
        )
        made_jump = steps.made_jump(number - 1)
        return Step(
            number, active, interval, t_previous, *interval(parameters), made_jump
        )
