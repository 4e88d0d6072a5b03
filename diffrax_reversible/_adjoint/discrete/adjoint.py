"""What the adjoint methods that walk back over the steps of a solve have in common."""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from diffrax import AbstractAdjoint, AbstractTerm, ConstantStepSize
from jaxtyping import PyTree

from ..._autodiff.refuse import refuse_derivative
from ..._autodiff.rule import with_reverse_sweep
from ..._autodiff.shard_map import without_varying_axes
from ..._compat import while_loop
from ..._controller.recorded import RecordedSteps
from ..._loop.closures import (
    hoist_event,
    hoist_fns,
    hoist_terms,
    is_subsaveat,
    with_controller,
    without_parameters,
)
from ..._loop.problem import is_none, Parameters, Problem, split
from ..._loop.steps import knows_its_steps, Span
from ..._solver.runge_kutta.tableau import with_differentiable_stages
from .sweep import AbstractStepSweep


def _refuse_time(name: str, what: str) -> str:
    return (
        f"`adjoint={name}()` does not differentiate with respect to {what}. "
        "Use `jax.lax.stop_gradient` on it, or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )


def _refuse_unknown_jumps(name, controller, solver, terms, init_state) -> None:
    """Raises if a controller that is not known to step over jumps does: `made_jump` is
    then traced, not `False`."""
    adapted = eqx.filter_eval_shape(
        controller.adapt_step_size,
        init_state.tprev,
        init_state.tnext,
        init_state.y,
        init_state.y,
        None,
        init_state.y,
        solver.error_order(terms),
        init_state.controller_state,
    )
    if adapted[3] is not False and not controller.jumps:
        raise NotImplementedError(
            f"`adjoint={name}()` supports jumps in the vector field only with "
            "`ClipStepSizeController(jump_ts=...)`, outermost or inside of "
            f"`RecordedSteps`; got the controller {controller}."
        )


class AbstractSweepAdjoint(AbstractAdjoint):
    """Runs diffrax's own loop, and differentiates it by a walk back over its steps."""

    @abc.abstractmethod
    def refuse(
        self, solver: Any, terms: PyTree[AbstractTerm], passed_solver_state: bool
    ) -> None:
        """Raises for what is not supported."""

    @abc.abstractmethod
    def room(self, max_steps: int | None) -> int:
        """How many steps to make room for, where they have to be recorded.

        **Raises:** `ValueError` if that is not known.
        """

    @abc.abstractmethod
    def sweep(
        self,
        loop: Callable,
        static: PyTree,
        problem: Problem,
        throw: bool,
        passed_solver_state: bool,
    ) -> AbstractStepSweep:
        """The loop and the walk back. `loop` is diffrax's own; `static` what of the
        problem is not an array."""

    def loop(self, **options):
        return without_varying_axes(self._solve, options)

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
        name = type(self).__name__
        self.refuse(solver, terms, passed_solver_state)
        solver = with_differentiable_stages(solver)
        constant = isinstance(stepsize_controller, ConstantStepSize)
        if passed_controller_state and constant:
            message = _refuse_time(
                name, "`t0` or `t1` when `controller_state` is passed"
            )
            t0, t1 = refuse_derivative((t0, t1), message)
        if not constant:
            message = _refuse_time(name, "`dt0` when steps are not constant")
            dt0 = refuse_derivative(dt0, message)
        message = _refuse_time(name, "a parameter of `stepsize_controller`")
        stepsize_controller = refuse_derivative(stepsize_controller, message)
        if not passed_solver_state:
            # `solver.init` has looked at the vector field after the jump.
            init_state = eqx.tree_at(lambda s: s.made_jump, init_state, False)

        t, y = init_state.tprev, init_state.y

        def step(terms):
            state = init_state
            return solver.step(
                terms, t, state.tnext, y, args, state.solver_state, state.made_jump
            )

        terms = forget(hoist_terms(terms, t, y, args, step))
        fns = forget(hoist_fns(saveat, t, y, args))
        controller = stepsize_controller
        if not knows_its_steps(controller):
            controller = RecordedSteps(
                controller, self.room(max_steps), _check_capacity=False
            )
            init_state = eqx.tree_at(
                lambda s: s.controller_state,
                init_state,
                controller.start(init_state.controller_state, t.dtype),
                is_leaf=is_none,
            )
        if isinstance(controller, RecordedSteps):
            _refuse_unknown_jumps(name, controller, solver, terms, init_state)
        if event is not None:
            # Conditions are handed the controller of the user.
            event = with_controller(event, stepsize_controller)

        def outer_while_loop(cond_fun, body_fun, state, *, max_steps, buffers):
            del cond_fun, body_fun, buffers
            subsaveats = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
            span = Span(t0, t1, dt0)
            parameters = Parameters(args, terms, fns, [s.ts for s in subsaveats], span)
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
                inner_event = forget(hoist_event(event, kwargs, t, y, args))
            options = dict(
                event=inner_event, max_steps=max_steps, progress_meter=progress_meter
            )
            problem = Problem(
                parameters,
                solver,
                controller,
                without_parameters(saveat),
                state,
                options,
            )
            inputs, static = split(problem)
            sweep = self.sweep(self._loop, static, problem, throw, passed_solver_state)
            final_state, _ = with_reverse_sweep(sweep, inputs)
            return final_state

        final_state, aux_stats = self._loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=controller,
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
        if controller is not stepsize_controller:
            final_state = eqx.tree_at(
                lambda s: s.controller_state,
                final_state,
                final_state.controller_state.controller_state,
                is_leaf=is_none,
            )
        return final_state, aux_stats
