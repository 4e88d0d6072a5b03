"""What the adjoint methods that pull back the steps of a solve have in common."""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from diffrax import AbstractAdjoint, AbstractTerm, ConstantStepSize
from jaxtyping import PyTree

from ..._autodiff.rule import with_reverse_sweep
from ..._autodiff.shard_map import without_varying_axes
from ..._call_site import call_site, CallSite
from ..._compat import nondifferentiable, while_loop
from ..._loop.closures import (
    convert_event,
    convert_saveat,
    convert_terms,
)
from ..._loop.problem import Parameters, Problem, split
from ..._loop.state import (
    differentiated,
    next_step,
    raised,
    reached_max_steps,
    Span,
    without_jump,
)
from ..._solver.runge_kutta.tableau import with_differentiable_stages
from ..._solver.updates.restart import RestartState
from ..instance import needs_instance
from .sweep import AbstractStepSweep


def _refuse(name: str, x: PyTree, what: str) -> PyTree:
    message = (
        f"`adjoint={name}()` does not differentiate with respect to {what}. "
        "Use `jax.lax.stop_gradient` on it, or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )
    return nondifferentiable(x, msg=message)


class AbstractDiscreteAdjoint(AbstractAdjoint):
    """Base class of the adjoint methods that run diffrax's own loop, and differentiate
    it by a reverse sweep over its steps."""

    @abc.abstractmethod
    def refuse(
        self, solver: Any, terms: PyTree[AbstractTerm], passed_solver_state: bool
    ) -> None:
        """Raises for what is not supported."""

    @abc.abstractmethod
    def sweep(
        self,
        loop: Callable,
        static: PyTree,
        problem: Problem,
        throw: bool,
        call_site: CallSite | None,
        passed_solver_state: bool,
    ) -> AbstractStepSweep:
        """The loop and its reverse sweep. `loop` is diffrax's own; `static` what of the
        problem is not an array."""

    @needs_instance
    def loop(self, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
        return without_varying_axes(self._solve, raised, options)

    def _solve(
        self,
        forget,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ):
        site = call_site()
        self.refuse(solver, terms, passed_solver_state)
        solver = with_differentiable_stages(solver)
        refuse = ft.partial(_refuse, type(self).__name__)
        if not isinstance(stepsize_controller, ConstantStepSize):
            dt0 = refuse(dt0, "`dt0` when steps are not constant")
        elif passed_controller_state:
            t0, t1 = refuse((t0, t1), "`t0` or `t1` when `controller_state` is passed")
        what = "a parameter of `stepsize_controller`"
        stepsize_controller = refuse(stepsize_controller, what)
        if not passed_solver_state:
            # `solver.init` has looked at the vector field after the jump.
            init_state = without_jump(init_state)
        t, tnext, made_jump = next_step(init_state)
        y, solver_state, *_ = differentiated(init_state)

        def step(terms):
            return solver.step(terms, t, tnext, y, args, solver_state, made_jump)

        terms = forget(convert_terms(terms, t, y, args, step))
        saves = forget(convert_saveat(saveat, t, y, args))

        def outer_while_loop(cond_fun, body_fun, state, *, max_steps, buffers):
            del cond_fun, body_fun, buffers
            inner_event = event
            if event is not None:
                kwargs = dict(
                    terms=terms,
                    solver=solver,
                    t0=t0,
                    t1=t1,
                    dt0=dt0,
                    saveat=saveat,
                    stepsize_controller=stepsize_controller,
                    max_steps=max_steps,
                )
                inner_event = forget(convert_event(event, kwargs, t, y, args))
            problem = Problem(
                Parameters(args, terms, solver, saves, Span(t0, t1, dt0)),
                stepsize_controller,
                state,
                dict(
                    event=inner_event,
                    max_steps=max_steps,
                    progress_meter=progress_meter,
                ),
            )
            inputs, static = split(problem)
            sweep = self.sweep(
                self._loop, static, problem, throw, site, passed_solver_state
            )
            return with_reverse_sweep(sweep, inputs)

        final_state, aux_stats = self._loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            init_state=init_state,
            progress_meter=progress_meter,
            inner_while_loop=ft.partial(while_loop, kind="lax"),
            outer_while_loop=outer_while_loop,
        )
        return _told_why(final_state) if throw else final_state, aux_stats


def _told_why(final_state):
    """The last state of the loop. Raises where there were too many steps since the solver
    does not restart, before diffrax says to allow for more of them."""
    _, solver_state, *_ = differentiated(final_state)
    if type(solver_state) is not RestartState or solver_state.restarts:
        return final_state
    due = solver_state.due & reached_max_steps(final_state)
    message = (
        "`max_steps` was reached, and the two copies of the solution that the reversible "
        "solver carries have come to differ by more than the error of a step, so that "
        "their difference makes the steps short. Use a solver that restarts, without "
        "`restart=None`; or `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`."
    )
    return eqx.error_if(final_state, due, message)
