"""Reversible solvers: a step is a sequence of updates, each of which can be undone."""

import abc
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import Array, PyTree

from ..._compat import depends, prevbefore, ω
from ..._types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    FloatScalarLike,
    RealScalarLike,
    Y,
)
from .repeat import repeat
from .side_step import NotKept
from .update import AbstractUpdate, apply, Line, pull_back, State, Substep, undo


class JumpSubstep(eqx.Module):
    """A jump of the vector field, at the start of a step: the times before and after
    it, and whether there was one."""

    t_before: Array
    t_after: Array
    made_jump: Array


class AbstractReversibleSolver(AbstractAdaptiveSolver):
    """A solver whose step is a sequence of updates that can be undone one by one, with
    one evaluation of the vector field each. `diffrax_reversible.ReversibleAdjoint`
    differentiates its solves exactly without storing them.

    A subclass says what its updates are, how they start, and its order; `step`,
    `backward_step` and the reverse rule are written once, here.

    **Cost:** a gradient takes as many evaluations of the vector field in the reverse
    sweep as the solve took, and one vector-Jacobian product for each.
    """

    @property
    def interpolates_from_start(self) -> bool:
        """Whether dense output is a shorter step from the start of the step, instead of
        what `dense_info_start` and `dense_info_end` determine."""
        return False

    def side_step(
        self,
        terms: PyTree[AbstractTerm],
        args: Args,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        solver_state: PyTree,
        made_jump: BoolScalarLike,
    ) -> Y:
        """The solution after a step from `t0` to `t1`, and nothing else."""
        state = State(y0, solver_state, self.zero_sums(y0, solver_state))
        return self._do(terms, t0, t1, state, args, made_jump).y

    @abc.abstractmethod
    def updates(
        self, terms: PyTree[AbstractTerm], t0: RealScalarLike, t1: RealScalarLike
    ) -> Sequence[tuple[tuple[Line, ...], Substep]]:
        """The step from `t0` to `t1`: one or more tuples of lines, each with the
        coefficients of the substeps for which the tuple is repeated, stacked along a
        leading axis."""

    @abc.abstractmethod
    def jump(self) -> AbstractUpdate | None:
        """The update that adapts the solver state to a jump of the vector field, with a
        [`diffrax_reversible.JumpSubstep`][]; `None` if the solver state does not
        depend on the vector field."""

    @abc.abstractmethod
    def zero_sums(self, y: Y, solver_state: PyTree) -> PyTree:
        """What [`State.sums`][] is at the start of a step: zeros, or `()`."""

    @abc.abstractmethod
    def error(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        state0: State,
        state1: State,
    ) -> Y | None:
        """The error estimate of the step from `state0` to `state1`, if there is one."""

    @abc.abstractmethod
    def dense_info_start(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        state0: State,
    ) -> DenseInfo:
        """The part of `dense_info` that the start of the step determines."""

    @abc.abstractmethod
    def dense_info_end(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        state1: State,
    ) -> DenseInfo:
        """The part of `dense_info` that the end of the step determines. Linear in
        `state1`, so that it can be transposed before the step has been undone."""

    def step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: PyTree,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, PyTree, RESULTS]:
        """As [`diffrax.AbstractSolver.step`][]."""
        state0 = State(y0, solver_state, self.zero_sums(y0, solver_state))
        state = self._do(terms, t0, t1, state0, args, made_jump)
        y_error = self.error(terms, t0, t1, state0, state)
        dense_info = self._dense_info(terms, t0, t1, state0, state, args, made_jump)
        return state.y, y_error, dense_info, state.solver_state, RESULTS.successful

    def backward_step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        ts_state: tuple[FloatScalarLike, ...],
        solver_state: PyTree,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, PyTree, RESULTS]:
        """The inverse of `step`: from the solution and the solver state at `t1` to
        those at `t0`.

        **Arguments:** as [`diffrax.AbstractSolver.step`][], and

        - `y1`: the solution at `t1`.
        - `ts_state`: the start of the previous step, as a tuple `(t,)`.
        - `solver_state`: the solver state at `t1`.

        **Returns:** `y0`; the `dense_info` of the step; the solver state at `t0`; a
        [`diffrax.RESULTS`][].

        **Cost:** the evaluations of one step.
        """
        del ts_state
        state1 = State(y1, solver_state, self.zero_sums(y1, solver_state))
        state0, state1 = self._undo(terms, t0, t1, state1, args, made_jump)
        dense_info = self._dense_info(terms, t0, t1, state0, state1, args, made_jump)
        return state0.y, dense_info, state0.solver_state, RESULTS.successful

    def pull_back_step(
        self,
        rebuild: Callable[
            [PyTree],
            tuple[PyTree[AbstractTerm], Args, RealScalarLike, RealScalarLike],
        ],
        parameters: PyTree,
        y1: Y,
        ts_state: tuple[FloatScalarLike, ...],
        solver_state: PyTree,
        made_jump: BoolScalarLike,
        cotangent_y: Y,
        cotangent_solver_state: PyTree,
        cotangent_dense_info: DenseInfo | None,
        batch: Any,
        cotangent_parameters: PyTree,
    ) -> tuple[Y, PyTree, Y, PyTree, PyTree]:
        """The reverse rule of `step`, fused with undoing it.

        **Arguments:**

        - `rebuild`: makes `(terms, args, t0, t1)` of the differentiated `parameters`.
        - `y1`, `ts_state`, `solver_state`, `made_jump`: as for
            [`diffrax_reversible.AbstractReversibleSolver.backward_step`][].
        - `cotangent_y`, `cotangent_solver_state`: of `y1` and `solver_state`.
        - `cotangent_dense_info`: `None` if nothing was interpolated in this step.
        - `batch`: `batch.accumulate` adds an increment to the cotangent of the parameters,
            `batch.pull_back` evaluates a function of them and pulls it back.
        - `cotangent_parameters`: what later steps have added up to.

        **Returns:** `y0` and the solver state at `t0`, their cotangents, and the
        cotangent of the parameters.

        **Cost:** one evaluation and one vector-Jacobian product per update.
        """
        del ts_state
        terms, args, t0, t1 = rebuild(parameters)
        state = State(y1, solver_state, self.zero_sums(y1, solver_state))
        cotangent = State(
            cotangent_y, cotangent_solver_state, self.zero_sums(y1, solver_state)
        )

        def add_dense(dense_info, state, cotangent, cotangent_parameters):
            if cotangent_dense_info is None:
                return cotangent, cotangent_parameters

            def evaluate(state, parameters):
                terms, _, t0, t1 = rebuild(parameters)
                return dense_info(terms, t0, t1, state)

            if not with_control:
                dense, vjp = jax.vjp(lambda s: evaluate(s, parameters), state)
            else:
                dense, vjp = jax.vjp(evaluate, state, parameters)
            increment, *rest = vjp({key: cotangent_dense_info[key] for key in dense})
            if with_control:
                cotangent_parameters = batch.accumulate(cotangent_parameters, *rest)
            return (cotangent**ω + increment**ω).ω, cotangent_parameters

        def all_substeps(parameters):
            terms, _, t0, t1 = rebuild(parameters)
            groups = self._groups(terms, t0, t1, made_jump)
            substeps = [substeps for _, substeps in groups]
            return eqx.filter(substeps, eqx.is_inexact_array)

        # The times, and the control of a `ControlTerm`, may be differentiated, too.
        with_control = depends(all_substeps, parameters)
        if with_control and cotangent_dense_info is not None:
            # The interpolant depends on them by a product of the sums and the control.
            _, state1 = self._undo(terms, t0, t1, state, args, made_jump)
        else:
            state1 = state
        cotangent, cotangent_parameters = add_dense(
            self.dense_info_end, state1, cotangent, cotangent_parameters
        )
        carry = (state, cotangent, cotangent_parameters)
        cotangent_substeps = []
        for lines, substeps in reversed(self._groups(terms, t0, t1, made_jump)):

            def backward(carry, substep, lines=lines):
                state, cotangent, cotangent_parameters = carry
                cotangent_substep = None
                for line in reversed(lines):
                    state, cotangent, increment, substep_increment = pull_back(
                        line,
                        rebuild,
                        parameters,
                        state,
                        cotangent,
                        substep,
                        with_control,
                        batch,
                    )
                    if increment is not None:
                        cotangent_parameters = batch.accumulate(
                            cotangent_parameters, increment
                        )
                    if cotangent_substep is None:
                        cotangent_substep = substep_increment
                    else:
                        cotangent_substep = (
                            cotangent_substep**ω + substep_increment**ω
                        ).ω
                return (state, cotangent, cotangent_parameters), cotangent_substep

            carry, found = repeat(backward, carry, substeps, reverse=True)
            cotangent_substeps.insert(0, found)
        state, cotangent, cotangent_parameters = carry
        if with_control:
            _, vjp = jax.vjp(all_substeps, parameters)
            cotangent_parameters = batch.accumulate(
                cotangent_parameters, *vjp(cotangent_substeps)
            )
        cotangent, cotangent_parameters = add_dense(
            self.dense_info_start, state, cotangent, cotangent_parameters
        )
        return (
            state.y,
            state.solver_state,
            cotangent.y,
            cotangent.solver_state,
            cotangent_parameters,
        )

    def _do(self, terms, t0, t1, state, args, made_jump):
        """The state at the end of a step."""
        for lines, substeps in self._groups(terms, t0, t1, made_jump):

            def forward(state, substep, lines=lines):
                for line in lines:
                    state = apply(line, terms, args, state, substep)
                return state, None

            state, _ = repeat(forward, state, substeps)
        return state

    def _undo(self, terms, t0, t1, state1, args, made_jump):
        """The states at the start and, with its sums, at the end of a step. `state1` is
        given without them."""
        state = state1
        for lines, substeps in reversed(self._groups(terms, t0, t1, made_jump)):

            def backward(state, substep, lines=lines):
                for line in reversed(lines):
                    state = undo(line, terms, args, state, substep)
                return state, None

            state, _ = repeat(backward, state, substeps, reverse=True)
        # Undone from zero, the sums have the opposite sign.
        return state, State(state1.y, state1.solver_state, (-(state.sums**ω)).ω)

    def _groups(self, terms, t0, t1, made_jump):
        groups = list(self.updates(terms, t0, t1))
        line = self.jump()
        if made_jump is False or line is None:
            return groups
        # diffrax steps to the number before a jump, and on from the number after it.
        t_before = prevbefore(prevbefore(t0))
        substep = JumpSubstep(*map(jnp.asarray, (t_before, t0, made_jump)))
        substep = jtu.tree_map(lambda x: x[None], substep)
        return [((line,), substep), *groups]

    def _dense_info(self, terms, t0, t1, state0, state1, args, made_jump):
        if self.interpolates_from_start:
            step = NotKept(ft.partial(self.side_step, terms, args, made_jump=made_jump))
            return dict(y0=state0.y, solver_state=state0.solver_state, side_step=step)
        start = self.dense_info_start(terms, t0, t1, state0)
        return start | self.dense_info_end(terms, t0, t1, state1)
