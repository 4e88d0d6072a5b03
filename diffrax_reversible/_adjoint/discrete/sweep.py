"""The walk back over the accepted steps of a solve."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree

from ..._autodiff.sweep import AbstractSweep, Batch, Inputs
from ..._loop.problem import differentiated, is_none, join, Problem, save_states
from ..._loop.steps import Steps
from ..._reversal.base import AbstractReversal
from ..._types import IntScalarLike
from .saves import Cursor, Step
from .step_back import StepBack, where


class Walk(eqx.Module):
    """What the walk carries: the end of the next step to be undone.

    - `remaining`: the number of steps that are left.
    - `y`, `solver_state`: as the reversal of the solver carries them.
    - `notes`: whatever else a sweep needs.
    """

    remaining: IntScalarLike
    cursors: list[Cursor]
    y: PyTree
    solver_state: PyTree
    cotangent_y: PyTree
    cotangent_solver_state: PyTree
    notes: PyTree


class AbstractStepSweep(AbstractSweep):
    """The loop of a solve and its reverse, step by step. `evaluate` returns the state at
    the end of the loop, and what was kept on the way.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `name`: of the adjoint method, for errors.
    """

    def __init__(self, loop: Callable, static: PyTree, name: str):
        self.loop = loop
        self.static = static
        self.name = name
        self.refusal = (
            f"`adjoint={name}()` does not differentiate with respect to a value that a "
            "callable closes over, other than the vector field and `SaveAt(fn=...)`. "
            "Pass it through `args`, or make the callable an `equinox.Module` of which "
            "it is a field; or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
        self.refusal_twice = (
            f"A gradient with `{name}()` cannot be differentiated in reverse mode again. "
            "For second derivatives use forward mode over reverse mode: "
            "`jax.jacfwd(jax.grad(...))`, `jax.jvp` of `jax.grad`, or a Hessian-vector "
            "product of these."
        )

    @abc.abstractmethod
    def depart(self, problem: Problem, final: Any) -> tuple[PyTree, PyTree, PyTree]:
        """`y`, `solver_state` and `notes` of the walk at its start."""

    @abc.abstractmethod
    def look_up(
        self,
        problem: Problem,
        memory: Any,
        final: Any,
        walk: Walk,
        step: Step,
        batch: Batch,
    ) -> tuple[AbstractReversal, PyTree]:
        """What undoes the next step, and the notes after that."""

    @abc.abstractmethod
    def compare(
        self,
        problem: Problem,
        memory: Any,
        final: Any,
        walk: Walk,
        step: Step,
        batch: Batch,
    ) -> Walk:
        """The walk, after `step` has been undone."""

    @abc.abstractmethod
    def trusted(self, problem: Problem, final: Any, walk: Walk) -> Bool[ArrayLike, ""]:
        """Whether the walk is to be trusted, once it is finished."""

    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> Walk:
        problem = join(inputs, self.static)
        final, _ = outputs
        cotangent, _ = cotangents
        cursors = [Cursor(s.save_index, s.saveat_ts_index) for s in save_states(final)]
        y, solver_state, notes = self.depart(problem, final)
        return Walk(
            final.num_accepted_steps,
            cursors,
            y,
            solver_state,
            cotangent.y,
            cotangent.solver_state,
            notes,
        )

    def length(self, carry: Walk) -> Int[ArrayLike, "..."]:
        return carry.remaining

    def step(
        self,
        inputs: Inputs,
        outputs: PyTree,
        cotangents: PyTree,
        carry: Walk,
        cotangent_parameters: PyTree,
        batch: Batch,
    ) -> tuple[Walk, PyTree]:
        problem = join(inputs, self.static)
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, cotangent_parameters, inputs.parameters, is_leaf=is_none
        )
        rebuild = lambda parameters: eqx.combine(parameters, problem.parameters)
        final, memory = outputs
        cotangent, _ = cotangents
        step = _current_step(problem, rebuild, final, carry, batch, parameters)
        reversal, notes = self.look_up(problem, memory, final, carry, step, batch)
        carried = (carry.y, carry.solver_state)
        back = StepBack(
            problem,
            reversal,
            rebuild,
            parameters,
            step,
            final,
            cotangent,
            carried,
            batch,
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
        walk = Walk(
            carry.remaining - 1,
            cursors,
            y,
            solver_state,
            cotangent_y,
            cotangent_solver_state,
            notes,
        )
        walk = self.compare(problem, memory, final, walk, step, batch)
        # Notes may be large: whoever takes them leaves them alone for an element that
        # is not active.
        rest = where(step.active, walk, carry)
        return dataclasses.replace(rest, notes=walk.notes), cotangent_parameters

    def finish(
        self, inputs: Inputs, outputs: PyTree, cotangents: PyTree, carry: Walk
    ) -> tuple[PyTree, Bool[Array, ""]]:
        problem = join(inputs, self.static)
        final, _ = outputs
        trusted = jnp.asarray(self.trusted(problem, final, carry))
        _, _, *buffers = differentiated(cotangents[0])
        state = (carry.cotangent_y, carry.cotangent_solver_state, *buffers)
        return state, trusted


def steps_of(problem: Problem, final: Any) -> Steps:
    """The steps of the solve that has ended in the state `final`."""
    return Steps(
        problem.stepsize_controller,
        final.controller_state,
        final.num_accepted_steps,
        final.tprev,
        problem.state.made_jump,
    )


def _current_step(problem, rebuild, final, carry, batch, parameters) -> Step:
    # Outside a batch the loop ends when there is nothing left to walk.
    active = True if len(batch.names) == 0 else carry.remaining > 0
    number = carry.remaining if active is True else jnp.maximum(carry.remaining, 1)
    steps = steps_of(problem, final)

    def interval(parameters):
        span = rebuild(parameters).span
        t0, t1 = steps.interval(number - 1, span)
        if active is True:
            return t0, t1
        # A step of length zero is safe to evaluate, whatever the vector field.
        return jnp.where(active, t0, span.t0), jnp.where(active, t1, span.t0)

    t_previous, _ = steps.interval(jnp.maximum(number - 2, 0), rebuild(parameters).span)
    made_jump = steps.made_jump(number - 1)
    return Step(number, active, interval, t_previous, *interval(parameters), made_jump)
