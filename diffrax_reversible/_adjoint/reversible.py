"""Exact gradients of a reversible solve, without storing it."""

import functools as ft
from typing import cast

import equinox as eqx
import jax.tree_util as jtu
from diffrax import AbstractAdjoint, ConstantStepSize, LeapfrogMidpoint

from .._compat import while_loop
from .._controller import knows_its_steps, RecordedSteps, Span
from .._solver import as_reversible, refuse_sde
from .accuracy import default_rtol, OnInaccurate
from .hoist import (
    hoist_event,
    hoist_fns,
    hoist_terms,
    is_subsaveat,
    with_controller,
    without_parameters,
)
from .problem import is_none, Parameters, Problem, split
from .refuse import refuse_derivative
from .rule import with_reverse_sweep
from .sweep import ReversibleSweep


def _refuse_time(name: str) -> str:
    return (
        f"`adjoint=ReversibleAdjoint()` does not differentiate with respect to {name}. "
        "Use `jax.lax.stop_gradient` on it, or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )


def _refuse_unknown_jumps(controller, solver, terms, init_state) -> None:
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
            "`adjoint=ReversibleAdjoint()` supports jumps in the vector field only with "
            "`ClipStepSizeController(jump_ts=...)`, outermost or inside of "
            f"`RecordedSteps`; got the controller {controller}."
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
    was: `SaveAt` in all its forms, constant and adaptive steps, events, jumps of the
    vector field, `t1 < t0`, `throw=False`.

    Differentiated are `y0`, `args`, `terms`, what the vector field and `SaveAt(fn=...)`
    close over, a `solver_state` that was passed in, and times: `t0`, `t1`,
    `SaveAt(ts=...)`, and `dt0` where steps are constant. When `t0` or `t1` moves,
    adaptive steps are held at their places relative to the two.

    Undoing the steps of a flow that contracts by `exp(-a T)` amplifies rounding by
    `exp(a T)`, so that a reversal is lost where `a T` comes near 16 in float32 or 36 in
    float64. The sweep compares the states that it finds with those that it should have
    found, and raises if the gradient could be wrong. `checkpoints` then helps; or, for
    a solver that can be damped, damping.

    **Cost** of a gradient: the evaluations of the vector field that the solve took, as
    many again in the reverse sweep, and one vector-Jacobian product for each. One more
    step is undone for each step with a save time where `SaveAt(ts=..., fn=...)` has an
    `fn` of its own, or where times are differentiated. Memory: that of one evaluation
    of the vector field, whatever the number of steps; the checkpoints; and, for
    adaptive steps, two numbers per step, with room for `max_steps`.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed in every step of the sweep: memory and time are those of a
    solve with a batched state. `jax.grad` of `jax.vmap` is what profits;
    `jax.vmap` of `jax.grad` asks for one gradient per element, and gets it.

    **Derivatives.** Reverse mode, forward mode, and forward mode over reverse mode (so
    a Hessian is to be had as `jax.jacfwd(jax.grad(...))`). Reverse mode over reverse
    mode raises.

    **Raises:**

    - `ValueError` if the solver is not reversible, for an SDE that cannot be solved in
        reverse, and for adaptive steps with `max_steps=None` (which
        `RecordedSteps(controller, capacity=...)` allows).
    - `NotImplementedError` for derivatives with respect to parameters of the step-size
        controller, and for jumps that a controller other than
        [`diffrax.ClipStepSizeController`][] steps over.
    - `RuntimeError`, when it is run, if the reversal has lost the solution (see
        `on_inaccurate`).

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

    checkpoints: int | None = eqx.field(static=True, default=None)
    rtol: float | None = eqx.field(static=True, default=None)
    on_inaccurate: str = eqx.field(static=True, default="raise")

    def __check_init__(self):
        if self.checkpoints is not None and self.checkpoints < 1:
            raise ValueError(
                "`ReversibleAdjoint(checkpoints=...)` must be at least 1, the number of "
                f"states to keep, or `None`; got {self.checkpoints}."
            )
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(
                f"`ReversibleAdjoint(rtol=...)` must be positive; got {self.rtol}."
            )
        if self.on_inaccurate not in ("raise", "nan", "warn"):
            raise ValueError(
                '`ReversibleAdjoint(on_inaccurate=...)` must be "raise", "nan" or '
                f'"warn"; got {self.on_inaccurate!r}.'
            )

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
        as_reversible(solver)
        refuse_sde(solver, terms)
        if passed_solver_state and type(solver) is LeapfrogMidpoint:
            # Its time is that of a step which is not in this solve.
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffeqsolve(LeapfrogMidpoint(), ..., solver_state=...)`. Leave out "
                "the solver state, and the first step is an explicit Euler step."
            )
        refuse = refuse_derivative
        constant = isinstance(stepsize_controller, ConstantStepSize)
        if passed_controller_state and constant:
            message = _refuse_time("`t0` or `t1` when `controller_state` is passed")
            t0, t1 = refuse((t0, t1), message)
        if not constant:
            dt0 = refuse(dt0, _refuse_time("`dt0` when steps are not constant"))
        stepsize_controller = refuse(
            stepsize_controller, _refuse_time("a parameter of `stepsize_controller`")
        )
        if not passed_solver_state:
            # `solver.init` has looked at the vector field after the jump.
            init_state = eqx.tree_at(lambda s: s.made_jump, init_state, False)

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
                is_leaf=is_none,
            )
        if isinstance(controller, RecordedSteps):
            _refuse_unknown_jumps(controller, solver, terms, init_state)
        rtol = default_rtol(y) if self.rtol is None else self.rtol
        on_inaccurate = cast(OnInaccurate, self.on_inaccurate)
        if on_inaccurate == "raise" and not throw:
            on_inaccurate = "nan"
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
                inner_event = hoist_event(event, kwargs, t, y, args)
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
            sweep = ReversibleSweep(
                self._loop, static, self.checkpoints, rtol, on_inaccurate
            )
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


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states of the solve to keep. The sweep restarts from each of
    them, so that rounding is amplified only in between. `None`: none.
- `rtol`: The largest accepted difference between the states that the sweep finds and
    those that it should have found (the initial state, and the checkpoints), relative
    to the largest entry of the solution. `None`: the cube root of the machine epsilon
    of the state, 5e-3 in float32 and 6e-6 in float64.
- `on_inaccurate`: What to do where the difference is larger: `"raise"` a
    `RuntimeError` at run time; make the gradient `"nan"`; or `"warn"`. With
    `diffeqsolve(..., throw=False)` the default is `"nan"`.
"""
