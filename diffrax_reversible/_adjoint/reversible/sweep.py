"""A walk back that undoes the steps, one by one."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._loop.problem import join, run
from ..._reversal.registry import as_reversible
from ..._types import RealScalarLike
from ..discrete.checkpoints import Checkpoints
from ..discrete.step_back import where
from ..discrete.sweep import AbstractStepSweep
from .accuracy import check, default_rtol, OnInaccurate, reversal_loss


class Loss(eqx.Module):
    """The largest loss of the reversal so far, and where it was."""

    size: Array
    t: RealScalarLike


class ReversibleSweep(AbstractStepSweep):
    """Every step is undone, and pulled back at the state that was found.

    - `slots`: for checkpoints.
    - `rtol` (`None`: the default), `on_inaccurate`: what loss to accept, and what to do
        about a larger one.
    """

    def __init__(
        self,
        loop: Callable,
        static: PyTree,
        name: str,
        slots: int | None,
        rtol: float | None,
        on_inaccurate: OnInaccurate,
    ):
        super().__init__(loop, static, name)
        self.slots = slots
        self.rtol = rtol
        self.on_inaccurate: OnInaccurate = on_inaccurate

    def evaluate(self, inputs):
        problem = join(inputs, self.static)

        def keep(checkpoints, before, after):
            accepted = after.num_accepted_steps > before.num_accepted_steps
            state = (after.y, after.solver_state)
            return checkpoints.keep(after.num_accepted_steps, state, accepted)

        checkpoints = None
        if self.slots is not None:
            state = (problem.state.y, problem.state.solver_state)
            checkpoints = Checkpoints.empty(self.slots, state)
        return run(self.loop, problem, checkpoints, keep)

    def depart(self, problem, final):
        reversal, terms = as_reversible(problem.solver), problem.parameters.terms
        carried = reversal.depart(terms, final.tprev, final.y, final.solver_state)
        dtype = jnp.finfo(jnp.result_type(*jtu.tree_leaves(final.y))).dtype
        return *carried, Loss(jnp.zeros((), dtype), final.tprev)

    def look_up(self, problem, memory, final, walk, step, batch):
        del memory, final, step, batch
        return as_reversible(problem.solver), walk.notes

    def compare(self, problem, memory, final, walk, step, batch):
        if memory is None:
            return walk
        found, known = memory.find(step.number - 1)
        carried = (walk.y, walk.solver_state)

        def restart():
            y0 = _arrived(problem, step.t0, *carried)
            terms = problem.parameters.terms
            reversal = as_reversible(problem.solver)
            departure = reversal.depart(terms, step.t0, *known)
            loss = reversal_loss(y0, known[0], final.y)
            return where(found, (departure, loss), (carried, 0 * loss))

        loss: Loss = walk.notes
        (y, solver_state), new_loss = lax.cond(
            batch.any(found), restart, lambda: (carried, 0 * loss.size)
        )
        t = jnp.where(new_loss > loss.size, step.t0, loss.t)
        loss = Loss(jnp.where(new_loss > loss.size, new_loss, loss.size), t)
        return dataclasses.replace(walk, y=y, solver_state=solver_state, notes=loss)

    def trusted(self, problem, final, walk):
        t0 = problem.parameters.span.t0
        y0 = _arrived(problem, t0, walk.y, walk.solver_state)
        loss = reversal_loss(y0, problem.state.y, final.y)
        worse = ~(loss <= walk.notes.size)
        t = jnp.where(worse, t0, walk.notes.t)
        loss = jnp.where(worse, loss, walk.notes.size)
        rtol = self.rtol
        if rtol is None:
            rtol = default_rtol(problem.state.y, final.num_accepted_steps)
        return check(loss, t, rtol, self.on_inaccurate)


def _arrived(problem, t, y, solver_state):
    """The solution at `t`, from what the walk carries there."""
    terms, args = problem.parameters.terms, problem.parameters.args
    rebuild = lambda _: (terms, args, t, t)
    y, _ = as_reversible(problem.solver).arrive(rebuild, None, y, solver_state)
    return y
