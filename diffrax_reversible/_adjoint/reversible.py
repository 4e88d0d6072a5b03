"""Exact gradients of a reversible solve, without storing it."""

import functools as ft

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdjoint, ClipStepSizeController

from .._compat import while_loop
from .._controller import knows_its_steps, RecordedSteps
from .._solver import AbstractReversibleSolver
from .hoist import hoist_fns, hoist_terms, without_fns
from .refuse import refuse_derivative
from .rule import with_reverse_sweep
from .sweep import Parameters, Problem, ReversibleSweep, split


class ReversibleAdjoint(AbstractAdjoint):
    def loop(
        self,
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
        del throw, passed_solver_state, passed_controller_state
        t, y = init_state.tprev, init_state.y
        terms = hoist_terms(terms, t, y, args)
        fns = hoist_fns(saveat, t, y, args)
        controller = stepsize_controller
        if not knows_its_steps(controller):
            controller = RecordedSteps(controller, max_steps, _check_capacity=False)
            init_state = eqx.tree_at(
                lambda s: s.controller_state,
                init_state,
                controller.start(init_state.controller_state, t.dtype),
                is_leaf=lambda x: x is None,
            )
        options = dict(
            event=event,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            progress_meter=progress_meter,
        )

        def outer_while_loop(cond_fun, body_fun, state, *, max_steps, buffers):
            del cond_fun, body_fun, max_steps, buffers
            problem = Problem(
                Parameters(args, terms, fns),
                solver,
                controller,
                without_fns(saveat),
                state,
                options,
            )
            inputs, static = split(problem)
            return with_reverse_sweep(ReversibleSweep(self._loop, static), inputs)

        final_state, aux_stats = self._loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=controller,
            saveat=saveat,
            init_state=init_state,
            inner_while_loop=ft.partial(while_loop, kind="lax"),
            outer_while_loop=outer_while_loop,
            **options,
        )
        if controller is not stepsize_controller:
            final_state = eqx.tree_at(
                lambda s: s.controller_state,
                final_state,
                final_state.controller_state.controller_state,
                is_leaf=lambda x: x is None,
            )
        return final_state, aux_stats
