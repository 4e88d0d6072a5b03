"""Exact gradients of a reversible solve, without storing it."""

import functools as ft

import equinox as eqx
import jax.tree_util as jtu
from diffrax import AbstractAdjoint, LeapfrogMidpoint, SubSaveAt

from .._compat import while_loop
from .._controller import knows_its_steps, RecordedSteps
from .._solver import as_reversible, refuse_sde
from .hoist import hoist_fns, hoist_terms, is_subsaveat, without_fns
from .refuse import refuse_derivative
from .rule import with_reverse_sweep
from .sweep import Parameters, Problem, ReversibleSweep, split


def _refuse_time(name: str) -> str:
    return (
        f"`adjoint=ReversibleAdjoint()` does not differentiate with respect to `{name}`"
        ". Use `jax.lax.stop_gradient` on it, or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )


def _refuse_jumps(controller, solver, terms, init_state) -> None:
    """Raises if `made_jump` may ever be true: it is then traced, not `False`."""
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
    if adapted[3] is not False or init_state.made_jump is not False:
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` does not support jumps in the vector field: "
            "`ClipStepSizeController(jump_ts=...)` and "
            "`diffeqsolve(..., made_jump=...)`. Split the interval at the jump into "
            "two `diffeqsolve` calls, or use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )


class ReversibleAdjoint(AbstractAdjoint):
    """Exact gradients at constant memory, for reversible solvers. Differentiates the
    numerical solution itself ("discretise-then-optimise"), as
    [`diffrax.RecursiveCheckpointAdjoint`][] does, and gives the same gradients up to
    rounding; but instead of storing the solve, or checkpoints of it, it undoes the
    steps one by one, and differentiates each at the state that it has found.

    Use it with a reversible solver, for example

    ```python
    diffrax.diffeqsolve(
        ..., solver=ReversibleALF4(), adjoint=ReversibleAdjoint()
    )
    ```

    whenever the memory or the time of a gradient matters. Everything else stays as it
    was: `SaveAt` in all its forms, constant and adaptive steps, `t1 < t0`,
    `throw=False`. Differentiated are `y0`, `args`, `terms`, what the vector field and
    `SaveAt(fn=...)` close over, and a `solver_state` that was passed in.

    Do not use it over times so long that the flow contracts by more than the precision
    of the numbers: undoing a contraction by `exp(-a T)` amplifies rounding by
    `exp(a T)`. It loses no more than the last few digits while `a T` is well below 16
    in float32 and 36 in float64.

    **Cost** of a gradient: the evaluations of the vector field that the solve took, as
    many again in the reverse sweep, and one vector-Jacobian product for each. A
    `SaveAt(ts=..., fn=...)` with an `fn` of its own costs one more step in every step
    that contains a save. Memory: that of one evaluation of the vector field, whatever
    the number of steps, and for adaptive steps two numbers per step, with room for
    `max_steps`.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed in every step of the sweep: memory and time are those of a
    solve with a batched state. `jax.grad` of `jax.vmap` is what profits;
    `jax.vmap` of `jax.grad` asks for one gradient per element, and gets it.

    **Derivatives.** Reverse mode, forward mode, and forward mode over reverse mode (so
    `jax.hessian` is to be had as `jax.jacfwd(jax.grad(...))`).

    **Raises:**

    - `ValueError` if the solver is not reversible, and for adaptive steps with
        `max_steps=None` (which `RecordedSteps(controller, capacity=...)` allows).
    - `NotImplementedError` for events, jumps, SDEs, and derivatives with respect to
        times.

    ??? cite "Reference"

        The idea is that of

        ```bibtex
        @inproceedings{zhuang2021mali,
            title={{MALI}: {A} memory efficient and reverse accurate integrator for
                   {N}eural {ODE}s},
            author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
                    Duncan, James S.},
            booktitle={International Conference on Learning Representations},
            year={2021}
        }
        ```

        and for adaptive steps that are recorded and replayed in reverse

        ```bibtex
        @article{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen, Christian
                    and Singh, Pranav and Wembe, Boris},
            journal={arXiv preprint arXiv:2410.09537},
            year={2024}
        }
        ```
    """

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
        del throw, passed_controller_state
        as_reversible(solver)
        if passed_solver_state and type(solver) is LeapfrogMidpoint:
            # Its time is that of a step which is not in this solve.
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffeqsolve(LeapfrogMidpoint(), ..., solver_state=...)`. Leave out "
                "the solver state, and the first step is an explicit Euler step."
            )
        if event is not None:
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffeqsolve(..., event=...)`. Use "
                "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )
        refuse_sde(solver, terms)
        _refuse_jumps(stepsize_controller, solver, terms, init_state)
        t0 = refuse_derivative(t0, _refuse_time("diffeqsolve(t0=...)"))
        t1 = refuse_derivative(t1, _refuse_time("diffeqsolve(t1=...)"))
        dt0 = refuse_derivative(dt0, _refuse_time("diffeqsolve(dt0=...)"))
        stepsize_controller = refuse_derivative(
            stepsize_controller, _refuse_time("diffeqsolve(stepsize_controller=...)")
        )
        saveat = self._refuse_save_times(saveat)

        t, y = init_state.tprev, init_state.y

        def step(terms):
            state = init_state
            return solver.step(
                terms, t, state.tnext, y, args, state.solver_state, state.made_jump
            )

        terms = hoist_terms(terms, t, y, args, step)
        fns = hoist_fns(saveat, t, y, args)
        controller = stepsize_controller
        if not knows_its_steps(controller):
            if max_steps is None:
                raise ValueError(
                    "`adjoint=ReversibleAdjoint()` must know how many steps to make "
                    "room for. Pass `diffeqsolve(..., max_steps=...)`, or "
                    "`stepsize_controller=RecordedSteps(controller, capacity=...)`."
                )
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

    @staticmethod
    def _refuse_save_times(saveat):
        message = _refuse_time("SaveAt(ts=...)")

        def refuse(subsaveat: SubSaveAt):
            where = lambda s: s.ts
            ts = refuse_derivative(subsaveat.ts, message)
            return eqx.tree_at(where, subsaveat, ts, is_leaf=lambda x: x is None)

        subs = jtu.tree_map(refuse, saveat.subs, is_leaf=is_subsaveat)
        return eqx.tree_at(lambda s: s.subs, saveat, subs, is_leaf=lambda x: x is None)


ReversibleAdjoint.__init__.__doc__ = """**Arguments:** None"""
