"""Gradients from the adjoint equation, along an interpolated solution."""

import operator as op
from typing import Literal

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdjoint, AbstractSolver, AbstractStepSizeController

from ..._autodiff.report import Action, check_action, OnFailure
from ..._autodiff.rule import with_reverse_sweep
from ..._autodiff.shard_map import without_varying_axes
from ..._call_site import call_site
from ..._checks import check_integer
from ..._compat import nondifferentiable
from ..._loop.closures import convert_terms, is_subsaveat
from ..._loop.state import (
    differentiated,
    is_none,
    next_step,
    raised,
    save_states,
)
from ..._types import RealScalarLike
from ..instance import needs_instance
from .options import (
    backward_options,
    jump_times,
    not_differentiated,
    refuse_collectives,
    refuse_unsupported,
)
from .problem import InterpolatedProblem, Model, ModelAndTimes, Times
from .sweep import InterpolatedSweep


class InterpolatedAdjoint(AbstractAdjoint):
    """Approximate gradients from the adjoint equation, along an interpolated solution.
    As [`diffrax.BacksolveAdjoint`][] it differentiates the exact solution, not the
    numerical one ("optimise-then-discretise"), and solves a second differential
    equation backwards in time. But that equation has only the adjoint for its state:
    the solution, which `BacksolveAdjoint` solves for once more, backwards, is
    interpolated. The solve keeps it at Chebyshev points of every interval between two
    save times.

    Use it

    - where the vector field contracts, so that solving backwards for the solution is
        unstable and `BacksolveAdjoint` fails; the adjoint equation is as stable
        backwards as the solution is forwards;
    - with any solver, implicit ones included, where an approximate gradient will do;
    - where solver, tolerances and step size controller of the backward pass should be
        other than those of the solve.

    Do not use it where the gradient must be that of the numerical solution
    (`ReversibleAdjoint()`, [`diffrax.RecursiveCheckpointAdjoint`][]), or for a solution
    that is not smooth.

    ```python
    diffrax.diffeqsolve(
        ..., solver=diffrax.Tsit5(), adjoint=InterpolatedAdjoint(16)
    )
    ```

    **Error.** That of the interpolation falls with the number of nodes like
    `rho**-nodes`, with a `rho > 1` that is the larger the shorter and smoother the
    solution is in each interval, until the error of what is interpolated is left: that
    of the solve and of its dense output. To this adds the error of the adjoint
    equation, by default solved with the tolerances of the solve, relative to the size
    of the adjoint at the end of each interval; and that of the quadrature. More save
    times make more intervals.

    The decay of the Chebyshev coefficients tells whether every component of solution and
    adjoint is resolved; where one is not, there is an error, which names the number of
    points that would do (`resolution_rtol`, `on_failure`). There is one, too, if the
    steps of the solve have been where its interpolation does not come near. A gradient
    that is much more sensitive than the solution loses more.

    **Differentiated** are `y0`, `args`, `terms`, what the vector field closes over, and
    the times `t0`, `t1` and `SaveAt(ts=...)`; and of the solution `ys` and `ts`.

    **Cost** of a gradient: the evaluations of the vector field that the solve took; one
    evaluation and one vector-Jacobian product for each evaluation of the adjoint
    equation, whose steps do not depend on those of the solve; and `quadrature` more of
    both in each interval for the gradient with respect to parameters. Memory:
    `nodes - 1` states for each interval, those of one interval a few times more while
    it is walked, and one evaluation of the vector field.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed at every Gauss point, so that memory and time are nearly
    those of a solve with a batched state. With `quadrature=None` there is one such
    cotangent for each element, which takes many times as much of both. An element that
    has failed and that the loss leaves out adds zero.

    **Collectives** in the vector field, such as `jax.lax.pmean` over a named axis of
    `jax.vmap`, need constant steps and explicit solvers in both passes: only then are
    all elements at the same times.

    **Derivatives.** Reverse mode, forward mode (of the numerical solution, with the
    first step and the steps of a constant controller held where they are), and forward
    mode over reverse mode. Reverse mode over reverse mode raises.

    **Jumps** of the vector field must be known, from
    `ClipStepSizeController(jump_ts=...)`: intervals then end there, too. Where dense
    output is worse than the steps, let these land on more times:
    `ClipStepSizeController(step_ts=...)`.

    **Raises:**

    - `NotImplementedError` for `SaveAt(steps=..., dense=..., fn=...)`, events,
        stochastic and controlled differential equations, terms with methods of their
        own, and solvers of several terms for several parts of the state.
    - `ValueError` if steps that are given (`diffrax.StepTo`, `ReplayedSteps`) would be
        used for the adjoint equation.
    - `RuntimeError`, when it is traced, for derivatives with respect to anything else
        than the above; and when it is run, if solution or adjoint are not resolved (see
        `on_failure`) or the adjoint equation could not be solved. With
        `diffeqsolve(..., throw=False)` the gradient is NaN.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{daulbaev2020interpolation,
            title={Interpolation technique to speed up gradients propagation in neural
                   {ODE}s},
            author={Daulbaev, Talgat and Katrutsa, Alexandr and Markeeva, Larisa and
                    Gusak, Julia and Cichocki, Andrzej and Oseledets, Ivan},
            booktitle={Advances in Neural Information Processing Systems},
            volume={33},
            year={2020}
        }
        ```
    """

    nodes: int = eqx.field(static=True)
    quadrature: int | Literal["nodes"] | None = eqx.field(
        static=True, default="nodes", kw_only=True
    )
    resolution_rtol: float = eqx.field(static=True, default=1e-3, kw_only=True)
    on_failure: Action = eqx.field(static=True, default="raise", kw_only=True)
    solver: AbstractSolver | None = eqx.field(default=None, kw_only=True)
    stepsize_controller: AbstractStepSizeController | None = eqx.field(
        default=None, kw_only=True
    )
    dt0: RealScalarLike | None = eqx.field(default=None, kw_only=True)
    max_steps: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_action("InterpolatedAdjoint", self.on_failure)
        name = "InterpolatedAdjoint"
        check_integer(name, "nodes", self.nodes, 4)
        check_integer(name, "quadrature", self.quadrature, 2, "nodes", None)
        check_integer(name, "max_steps", self.max_steps, 1, None)
        if not self.resolution_rtol > 0:
            raise ValueError(
                f"`{name}(resolution_rtol=...)` must be positive; got "
                f"{self.resolution_rtol!r}."
            )

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
        refuse_unsupported(solver, terms, saveat, event)
        refuse = lambda x, what: nondifferentiable(x, msg=not_differentiated(what))
        dt0 = refuse(dt0, "`dt0`")
        stepsize_controller = refuse(
            stepsize_controller, "a parameter of `stepsize_controller`"
        )
        solver = refuse(solver, "a parameter of the solver")
        own = dict(
            solver=self.solver,
            stepsize_controller=self.stepsize_controller,
            dt0=self.dt0,
            max_steps=self.max_steps,
        )
        own = refuse(own, "a parameter of the adjoint method")
        passed = dict(
            solver_state=passed_solver_state, controller_state=passed_controller_state
        )
        for name in [name for name, is_passed in passed.items() if is_passed]:
            where = op.attrgetter(name)
            state = refuse(where(init_state), f"`{name}`")
            init_state = eqx.tree_at(where, init_state, state, is_leaf=is_none)
        (t, _, _), (y, *_) = next_step(init_state), differentiated(init_state)
        dtype = jnp.result_type(t)
        terms = forget(convert_terms(terms, t, y, args, lambda _: None))
        subsaveats = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
        none = jnp.zeros(0, dtype)
        save_times = [none if s.ts is None else s.ts for s in subsaveats]
        ts = jnp.concatenate([none, *save_times])
        without_ts = lambda s: eqx.tree_at(lambda s: s.ts, s, None, is_leaf=is_none)
        model = Model(args, terms)
        direction = model.parts[0].direction
        backward = backward_options(
            own, direction, solver, stepsize_controller, dt0, max_steps
        )
        refuse_collectives(model, t, y)
        problem = InterpolatedProblem(
            y0=y,
            parameters=ModelAndTimes(model, Times(t0, t1, ts)),
            solver=solver,
            stepsize_controller=stepsize_controller,
            subs=jtu.tree_map(without_ts, saveat.subs, is_leaf=is_subsaveat),
            state=eqx.tree_at(lambda s: s.y, init_state, None),
            jumps=jump_times(stepsize_controller, dtype),
            options=dict(
                saveat=eqx.tree_at(lambda s: s.subs, saveat, None, is_leaf=is_none),
                dt0=dt0,
                max_steps=max_steps,
                progress_meter=progress_meter,
            ),
            backward=backward,
            passed_solver_state=passed_solver_state,
            lengths=tuple(map(len, save_times)),
            nodes=self.nodes,
        )
        inputs, static = problem.to_inputs()
        raises = self.on_failure == "raise"
        sweep = InterpolatedSweep(
            self._loop,
            static,
            self.nodes if self.quadrature == "nodes" else self.quadrature,
            self.resolution_rtol,
            OnFailure("nan" if raises and not throw else self.on_failure, site),
            throw,
        )
        final, stats = with_reverse_sweep(sweep, inputs)

        def times(sub, ts, save):
            parts = [t0[None]] * sub.t0 + [ts] + [t1[None]] * sub.t1
            ts = jnp.concatenate(parts)
            return lax.stop_gradient(save.ts) + (ts - lax.stop_gradient(ts))

        ts = list(map(times, subsaveats, save_times, save_states(final)))
        where = lambda s: [x.ts for x in save_states(s)]
        return (eqx.tree_at(where, final, ts) if ts else final), stats


InterpolatedAdjoint.__init__.__doc__ = """**Arguments:**

- `nodes`: The number of Chebyshev points, at least 4, in each interval between two save
    times, ends included.
- `quadrature`: The gradient with respect to parameters is an integral over time.
    `"nodes"`: by Gauss-Legendre quadrature with `nodes` points in each interval. A
    number: with so many, which a stiff adjoint may need. `None`: as part of the adjoint
    equation, as in the paper; then its state is larger by all parameters, and the step
    size control sees them.
- `resolution_rtol`: The largest accepted error of the interpolation, estimated from the
    decay of the Chebyshev coefficients, of each component of the solution (and of the
    adjoint, with quadrature) relative to its largest absolute value. Components that are
    nothing but rounding of others are left out.
- `on_failure`: What to do where it is larger: `"raise"` a `RuntimeError` at run time;
    make the gradient `"nan"`; or `"warn"`. With `diffeqsolve(..., throw=False)` the
    default is `"nan"`.
- `solver`, `stepsize_controller`, `dt0`, `max_steps`: Those of the adjoint equation, in
    each interval. By default those of the solve. The sign of `dt0` is not looked at.
"""
