"""Gradients from the adjoint equation, along an interpolated solution."""

from typing import Any, cast

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdaptiveStepSizeController, AbstractAdjoint

from ..._autodiff.refuse import refuse_derivative
from ..._autodiff.rule import with_reverse_sweep
from ..._autodiff.shard_map import without_varying_axes
from ..._loop.closures import hoist_terms, is_subsaveat
from ..._loop.problem import is_none, save_states
from .options import (
    backward_options,
    jump_times,
    KEYWORDS,
    not_differentiated,
    refuse_unsupported,
)
from .problem import Model, Parameters, Problem, split, Times
from .resolution import OnUnresolved
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

    **Error.** That of the interpolation falls with the number of nodes like
    `rho**-nodes`, with a `rho > 1` that is the larger the shorter and smoother the
    solution is in each interval, until the error of what is interpolated is left: that
    of the solve and of its dense output. To this adds the error of the adjoint
    equation, by default solved with the tolerances of the solve, relative to the size
    of the adjoint at the end of each interval; and that of the quadrature. More save
    times make more intervals.

    The decay of the Chebyshev coefficients tells whether solution and adjoint are
    resolved; where one of them is not, there is an error, which names the number of
    points that would do (`rtol`, `on_unresolved`). There is one, too, if the steps of
    the solve have been where its interpolation does not come near. The estimate is
    that of the interpolation, relative to the solution: a gradient that is much more
    sensitive than the solution loses more.

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
    those of a solve with a batched state. With `quadrature=False` there is one such
    cotangent for each element, which takes many times as much of both.

    **Derivatives.** Reverse mode, forward mode (of the numerical solution, with the
    first step and the steps of a constant controller held where they are), and forward
    mode over reverse mode. Reverse mode over reverse mode raises.

    **Jumps** of the vector field must be known, from
    `ClipStepSizeController(jump_ts=...)`: intervals then end there, too.

    **Raises:**

    - `NotImplementedError` for `SaveAt(steps=..., dense=..., fn=...)`, events,
        stochastic and controlled differential equations, solvers of several terms for
        several parts of the state, and for derivatives with respect to anything else
        than the above.
    - `NotImplementedError` inside of `jax.shard_map(..., check_vma=True)`, unless with
        `diffeqsolve(..., throw=False)`.
    - `ValueError` if steps that are given (`diffrax.StepTo`, `ReplayedSteps`) would be
        used for the adjoint equation, and for `landing=True` with steps that are not
        adaptive.
    - `RuntimeError`, when it is run, if solution or adjoint are not resolved (see
        `on_unresolved`) or the adjoint equation could not be solved. With
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
    quadrature: int | bool = eqx.field(static=True)
    landing: bool = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    on_unresolved: str = eqx.field(static=True)
    kwargs: dict[str, Any]

    def __init__(
        self,
        nodes: int,
        *,
        quadrature: int | bool = True,
        landing: bool = False,
        rtol: float = 1e-3,
        on_unresolved: str = "raise",
        **kwargs: Any,
    ):
        self.nodes = nodes
        self.quadrature = quadrature
        self.landing = landing
        self.rtol = rtol
        self.on_unresolved = on_unresolved
        self.kwargs = kwargs

    def __check_init__(self):
        if self.nodes < 4:
            raise ValueError(
                "`InterpolatedAdjoint(nodes=...)` must be at least 4, the number of "
                f"Chebyshev points in each interval; got {self.nodes}."
            )
        if self.quadrature is not True and self.quadrature is not False:
            if self.quadrature < 2:
                raise ValueError(
                    "`InterpolatedAdjoint(..., quadrature=...)` must be at least 2, the "
                    "number of Gauss points in each interval, `True` or `False`; got "
                    f"{self.quadrature}."
                )
        if not self.rtol > 0:
            raise ValueError(
                f"`InterpolatedAdjoint(..., rtol=...)` must be positive; got {self.rtol}."
            )
        if self.on_unresolved not in ("raise", "nan", "warn"):
            raise ValueError(
                '`InterpolatedAdjoint(..., on_unresolved=...)` must be "raise", "nan" or '
                f'"warn"; got {self.on_unresolved!r}.'
            )
        unknown = sorted(set(self.kwargs) - set(KEYWORDS))
        if len(unknown) > 0:
            raise ValueError(
                f"`InterpolatedAdjoint(..., {unknown[0]}=...)` is not an argument of the "
                "solve of the adjoint equation; these are "
                f"{', '.join(f'`{key}`' for key in KEYWORDS)}."
            )

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
        refuse_unsupported(solver, terms, saveat, event)
        adaptive = isinstance(stepsize_controller, AbstractAdaptiveStepSizeController)
        if self.landing and not adaptive:
            raise ValueError(
                "`InterpolatedAdjoint(..., landing=True)` needs an adaptive step size "
                f"controller; got {stepsize_controller}."
            )
        refuse = lambda x, what: refuse_derivative(x, not_differentiated(what))
        dt0 = refuse(dt0, "`dt0`")
        stepsize_controller = refuse(
            stepsize_controller, "a parameter of `stepsize_controller`"
        )
        kwargs = refuse(self.kwargs, "a parameter of the adjoint method")
        solver = refuse(solver, "a parameter of the solver")
        if passed_solver_state:
            init_state = eqx.tree_at(
                lambda s: s.solver_state,
                init_state,
                refuse(init_state.solver_state, "`solver_state`"),
                is_leaf=is_none,
            )
        if passed_controller_state:
            init_state = eqx.tree_at(
                lambda s: s.controller_state,
                init_state,
                refuse(init_state.controller_state, "`controller_state`"),
                is_leaf=is_none,
            )
        t, y = init_state.tprev, init_state.y
        terms = forget(hoist_terms(terms, t, y, args, lambda _: None))
        subsaveats = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
        none = jnp.zeros(0, t.dtype)
        save_times = [none if s.ts is None else s.ts for s in subsaveats]
        ts = jnp.concatenate([none, *save_times])
        without_ts = lambda s: eqx.tree_at(lambda s: s.ts, s, None, is_leaf=is_none)
        model = Model(args, terms)
        problem = Problem(
            y0=y,
            parameters=Parameters(model, Times(t0, t1, ts)),
            solver=solver,
            stepsize_controller=stepsize_controller,
            subs=jtu.tree_map(without_ts, saveat.subs, is_leaf=is_subsaveat),
            state=eqx.tree_at(lambda s: s.y, init_state, None),
            jumps=jump_times(stepsize_controller, t.dtype),
            options=dict(
                saveat=eqx.tree_at(lambda s: s.subs, saveat, None, is_leaf=is_none),
                dt0=dt0,
                max_steps=max_steps,
                progress_meter=progress_meter,
            ),
            backward=backward_options(
                kwargs,
                model.parts[0].direction,
                solver,
                stepsize_controller,
                dt0,
                max_steps,
            ),
            passed_solver_state=passed_solver_state,
            lengths=tuple(map(len, save_times)),
            nodes=self.nodes,
            landing=self.landing,
        )
        inputs, static = split(problem)
        on_unresolved = cast(OnUnresolved, self.on_unresolved)
        if on_unresolved == "raise" and not throw:
            on_unresolved = "nan"
        quadrature = self.nodes if self.quadrature is True else self.quadrature or None
        sweep = InterpolatedSweep(
            self._loop, static, quadrature, self.rtol, on_unresolved, throw
        )
        outputs = with_reverse_sweep(sweep, inputs)
        final = outputs.final

        def times(sub, ts, save):
            parts = [t0[None]] * sub.t0 + [ts] + [t1[None]] * sub.t1
            ts = jnp.concatenate(parts)
            return lax.stop_gradient(save.ts) + (ts - lax.stop_gradient(ts))

        ts = list(map(times, subsaveats, save_times, save_states(final)))
        where = lambda s: [x.ts for x in save_states(s)]
        return (eqx.tree_at(where, final, ts) if ts else final), outputs.stats


InterpolatedAdjoint.__init__.__doc__ = """**Arguments:**

- `nodes`: The number of Chebyshev points, at least 4, in each interval between two save
    times, ends included.
- `quadrature`: The gradient with respect to parameters is an integral over time.
    `True`: by Gauss-Legendre quadrature with `nodes` points in each interval. A number:
    with so many, which a stiff adjoint may need. `False`: as part of the adjoint
    equation, as in the paper; then its state is larger by all parameters, and the step
    size control sees them.
- `landing`: Whether the solve steps exactly onto the Chebyshev points, instead of
    interpolating between its steps. This makes more steps and needs an adaptive
    controller; it is for solvers whose dense output is worse than their steps.
- `rtol`: The largest accepted error of the interpolation, estimated from the decay of
    the Chebyshev coefficients, relative to the largest entry of each leaf of the
    solution (or of the adjoint, with `quadrature`).
- `on_unresolved`: What to do where it is larger: `"raise"` a `RuntimeError` at run time;
    make the gradient `"nan"`; or `"warn"`. With `diffeqsolve(..., throw=False)` the
    default is `"nan"`.
- `solver`, `stepsize_controller`, `dt0`, `max_steps`: Those of the adjoint equation, in
    each interval. By default those of the solve. The sign of `dt0` is not looked at.
"""
