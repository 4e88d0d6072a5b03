"""The reversal of a solver that is made of updates."""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._autodiff.batch import Batch
from .._autodiff.linear import cotangents_depend
from .._compat import depends
from .._solver.updates.repeat import repeat
from .._solver.updates.restart import (
    copy_of,
    cotangent_of,
    jumps_after,
    make_anew,
    pull_back_record,
    with_copy,
)
from .._solver.updates.solver import AbstractUpdateSolver, undo, Updates
from .._solver.updates.update import AbstractUpdate, Repeat, State, Step
from .._tree import add, zeros_of
from .base import AbstractReversal, Cotangent, ReverseStep


class UpdatesReversal(AbstractReversal):
    """Undoes and pulls back the updates of a step one by one.

    **Cost:** one evaluation and one vector-Jacobian product per update.

    - `stand_in`: a solver with the same updates, for one that is not made of updates
        itself.
    """

    stand_in: AbstractUpdateSolver | None = None

    def _updates(self, step: ReverseStep, parameters: PyTree) -> Step:
        inputs = step.inputs_of(parameters)
        solver = cast(AbstractUpdateSolver, self.stand_in or inputs.solver)
        made_jump = jumps_after(step.restarts, step.made_jump)
        made = solver.updates(inputs.terms, inputs.t0, inputs.t1, made_jump)
        return made._replace(updates=_as_jax(made.updates))

    def undo(self, step, end):
        state0, state1, sums = self._states(step, end)
        updates = self._updates(step, step.parameters)
        solver_state0 = with_copy(end.solver_state, state0.solver_state)
        return state0.y, solver_state0, updates.dense_info(state0, state1, sums)

    def _states(self, step, end):
        """The states at both ends, and the sums."""
        inputs, state1 = step.inputs, State(end.y, copy_of(end.solver_state))
        updates = self._updates(step, step.parameters).updates
        state0, sums = undo(updates, inputs.terms, inputs.args, state1)
        return state0, state1, sums

    def pull_back(self, step, end, cotangent, batch, total):
        from_dense, total = self._pull_back_dense(step, end, cotangent, batch, total)
        cotangent0, cotangent1, cotangent_sums = from_dense
        cotangent1 = add(
            State(cotangent.y, copy_of(cotangent.solver_state)), cotangent1
        )
        state1 = State(end.y, copy_of(end.solver_state))
        updates = lambda parameters: self._updates(step, parameters).updates
        state, cotangent_state, total = _pull_back_all(
            updates, step, (state1, cotangent1, total), cotangent_sums, batch
        )
        carry = (state, add(cotangent_state, cotangent0), total)

        def restart(parameters):
            inputs = step.inputs_of(parameters)
            interval = (inputs.t0, inputs.t1)
            return _as_jax(make_anew(inputs.solver, *interval, step.restarts))

        if step.restarts is not False:
            # A loop of at most one turn, which unlike `lax.cond` copies nothing.
            def pull_back(loop):
                _, carry = loop
                carry = _pull_back_all(restart, step, carry, None, batch)
                return jnp.array(False), carry

            loop = (jnp.asarray(batch.any(step.restarts)), carry)
            _, carry = lax.while_loop(lambda loop: loop[0], pull_back, loop)
        state, cotangent_state, total = carry
        solver_state, cotangent_solver_state, recorded = pull_back_record(
            end.solver_state, cotangent.solver_state, step.restarts
        )
        if recorded is not None:
            cotangent_state = add(cotangent_state, State(*recorded))
        return (
            (state.y, with_copy(solver_state, state.solver_state)),
            cotangent_state.y,
            cotangent_of(cotangent_solver_state, cotangent_state.solver_state),
            total,
        )

    def _pull_back_dense(self, step, end, cotangent: Cotangent, batch, total):
        """The cotangents of the states at both ends and of the sums, from that of the
        dense output."""
        if cotangent.dense_info is None:
            return (None, None, None), total

        def dense_info(states, parameters):
            return self._updates(step, parameters).dense_info(*states)

        states = zeros_of(lambda: self._states(step, end))
        if cotangents_depend(dense_info, states, step.parameters, cotangent.dense_info):
            # At the cost of undoing the step once more.
            states = self._states(step, end)
        _, found, total = batch.vjp(
            dense_info, states, step.parameters, cotangent.dense_info, total
        )
        return found, total


def _as_jax(updates) -> list[PyTree]:
    as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return jtu.tree_map(as_jax, list(updates))


def _pull_back_all(
    updates_of: Callable[[PyTree], Updates],
    step: ReverseStep,
    carry: tuple[State, State, PyTree],
    cotangent_sums: PyTree,
    batch: Batch,
) -> tuple[State, State, PyTree]:
    """Undoes updates, which are functions of the parameters, and pulls them back: the
    state before them, the cotangent of that state and of the parameters."""
    updates = updates_of(step.parameters)

    # Of times, of the control, of what the solver holds.
    def coefficients(parameters):
        return jtu.tree_leaves(eqx.filter(updates_of(parameters), eqx.is_inexact_array))

    is_variable = depends(coefficients, step.parameters) and eqx.is_inexact_array

    def backward(carry, updates):
        found = []
        for update in reversed(updates):
            carry, variables = _pull_back(
                update, is_variable, step, carry, cotangent_sums, batch
            )
            found.insert(0, variables)
        return carry, tuple(found), None

    cotangent_updates = []
    for update in reversed(updates):
        if isinstance(update, Repeat):
            carry, found, _ = repeat(backward, carry, update.updates, reverse=True)
            found = Repeat(found)
        else:
            carry, (found,), _ = backward(carry, (update,))
        cotangent_updates.insert(0, found)
    state, cotangent_state, total = carry
    if is_variable:
        _, _, total = batch.vjp(
            lambda _, parameters: coefficients(parameters),
            (),
            step.parameters,
            jtu.tree_leaves(cotangent_updates),
            total,
        )
    return state, cotangent_state, total


def _pull_back(
    update: AbstractUpdate,
    is_variable,
    step: ReverseStep,
    carry: tuple[State, State, PyTree],
    cotangent_sums: PyTree,
    batch: Batch,
) -> tuple[tuple[State, State, PyTree], AbstractUpdate]:
    """Undoes one update and pulls it back: the state before it, the cotangent of that
    state and of the parameters; and the cotangents of its coefficients."""
    state, cotangent_state, total = carry
    variables, fixed = eqx.partition(update, is_variable)

    def evaluate(point, parameters):
        point, variables = point
        inputs = step.inputs_of(parameters)
        return eqx.combine(variables, fixed).evaluate(inputs.terms, inputs.args, point)

    def write(state, variables, k):
        state, contribution = eqx.combine(variables, fixed).write(state, k)
        return state, None if cotangent_sums is None else contribution

    point = (update.read(state), variables)
    k = zeros_of(lambda: evaluate(point, step.parameters))
    if depends(lambda k: update.read(write(state, variables, k)[0]), k):
        name = type(update).__name__
        raise ValueError(
            f"`{name}.write` changes what `{name}.read` looks at, so that the update "
            "cannot be undone. Let it read one part of the state and write another."
        )

    def vjp_write(fn, *args):
        (_, contribution), vjp = eqx.filter_vjp(fn, *args)
        return vjp((cotangent_state, None if contribution is None else cotangent_sums))

    def cotangent_of_k(state_and_k):
        state, k = state_and_k
        (cotangent,) = vjp_write(lambda k: write(state, variables, k), k)
        return cotangent

    # An affine `write` can be transposed before `k` is known.
    if depends(cotangent_of_k, (state, k)):
        k = evaluate(point, step.parameters)
    cotangent_k = cotangent_of_k((update.unwrite(state, k), k))
    k, (cotangent_point, from_evaluate), total = batch.vjp(
        evaluate, point, step.parameters, cotangent_k, total
    )
    state = update.unwrite(state, k)
    cotangent_state, from_write = vjp_write(
        lambda state, variables: write(state, variables, k), state, variables
    )
    _, vjp_read = eqx.filter_vjp(update.read, state)
    cotangent_state = add(cotangent_state, *vjp_read(cotangent_point))
    return (state, cotangent_state, total), add(from_write, from_evaluate)
