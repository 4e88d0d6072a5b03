"""Pulling back a Runge-Kutta step whose start is known, stage by stage."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver
from jaxtyping import PyTree

from .._compat import ω
from .._solver.runge_kutta.tableau import combine, full_tableau_of
from .._types import BoolScalarLike, Y
from .base import AbstractReversal


class Stages(eqx.Module):
    """What is evaluated in a step.

    - `k`: the vector field times the control at every stage, along a leading axis.
    - `f0`: the vector field at the first stage; `None` if the solver does not have it
        from the step before (FSAL).
    """

    k: PyTree
    f0: PyTree


def no_stages(solver: AbstractSolver, y: Y) -> PyTree:
    """Room for the stages of a step."""
    s = len(full_tableau_of(solver).b)
    zeros = lambda x: jnp.zeros((s, *jnp.shape(x)), jnp.result_type(x))
    return jtu.tree_map(zeros, y)


def _outer(weights, x: PyTree) -> PyTree:
    """`x` times each of the weights, along a leading axis."""
    product = lambda x: jnp.tensordot(jnp.asarray(weights, x.dtype), x, axes=0)
    return jtu.tree_map(product, x)


class StagesReversal(AbstractReversal):
    """What pulls back one particular step.

    - `y0`: where it starts.
    - `solver_state`: that of the solver at its start. What it has cached may be zero,
        unless `cached`.
    - `evaluates_first`: whether the step evaluates its first stage.
    - `cached`: whether the first stage is to be taken from `solver_state`; `None` if it
        never is.
    - `stages`: if they are known.
    """

    solver: AbstractSolver
    y0: Y
    solver_state: PyTree
    evaluates_first: BoolScalarLike
    cached: BoolScalarLike | None
    stages: Stages | None

    @property
    def _has_cache(self) -> bool:
        return self.solver_state is not None

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        del y1, ts_state, solver_state
        state0 = self.solver_state
        if self._has_cache:
            # Whatever it has cached it can evaluate.
            evaluates, f0 = state0
            if self.cached is not None:
                evaluates = ~self.cached
            state0 = (jnp.asarray(evaluates) | self.evaluates_first, f0)
        _, _, dense_info, _, result = self.solver.step(
            terms, t0, t1, self.y0, args, state0, made_jump
        )
        return self.y0, dense_info, state0, result

    def _evaluate(self, rebuild, i, point, parameters):
        """The vector field times the control, and the vector field, at stage `i`."""
        terms, args, t0, t1 = rebuild(parameters)
        c = jnp.asarray(full_tableau_of(self.solver).c, jnp.result_type(t0, t1))[i]
        t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
        control = terms.contr(t0, t1)
        if not self._has_cache:
            return terms.vf_prod(t, point, args, control), None
        f = terms.vf(t, point, args)
        return terms.prod(f, control), f

    def _recompute(self, rebuild, parameters) -> Stages:
        """All stages but the last, which no other stage is a function of."""
        if self.stages is not None:
            return self.stages
        a = jnp.asarray(full_tableau_of(self.solver).a)
        evaluate = lambda i, point: self._evaluate(rebuild, i, point, parameters)
        f0 = None
        if self._has_cache:
            _, f0 = self.solver_state

        def stage(i, stages):
            point = (self.y0**ω + combine(a[i], stages.k) ** ω).ω
            k, f = evaluate(i, point)
            if self._has_cache:
                f = jtu.tree_map(lambda x, y: jnp.where(i == 0, x, y), f, stages.f0)
            if self.cached is not None:
                terms, _, t0, t1 = rebuild(parameters)
                known = (terms.prod(f0, terms.contr(t0, t1)), f0)
                k, f = jtu.tree_map(
                    lambda x, y: jnp.where((i == 0) & self.cached, x, y), known, (k, f)
                )
            write = lambda x, xs: xs.at[i].set(x)
            return Stages(jtu.tree_map(write, k, stages.k), f)

        stages = Stages(no_stages(self.solver, self.y0), f0)
        last = len(a) - 1
        if self._has_cache:
            return lax.fori_loop(0, max(last, 1), stage, stages)
        return lax.fori_loop(0, last, stage, stages) if last > 0 else stages

    def pull_back_step(
        self,
        rebuild,
        parameters,
        y1,
        ts_state,
        solver_state,
        made_jump,
        cotangent_y,
        cotangent_solver_state,
        cotangent_dense_info,
        batch: Any,
        cotangent_parameters,
    ):
        del y1, ts_state, solver_state, made_jump
        tableau = full_tableau_of(self.solver)
        a, last = jnp.asarray(tableau.a), len(tableau.b) - 1
        stages = self._recompute(rebuild, parameters)
        cotangent_y0 = cotangent_y
        cotangent_k: Any = None
        if cotangent_dense_info is not None:
            cotangent_y = (cotangent_y**ω + cotangent_dense_info["y1"] ** ω).ω
            cotangent_y0 = (cotangent_y**ω + cotangent_dense_info["y0"] ** ω).ω
            cotangent_k = cotangent_dense_info.get("k")
        from_y1 = _outer(tableau.b, cotangent_y)
        if cotangent_k is None:
            cotangent_k = from_y1
        else:
            cotangent_k = (cotangent_k**ω + from_y1**ω).ω
        cotangent_f1 = None
        if self._has_cache:
            _, cotangent_f1 = cotangent_solver_state

        def at(cotangent_k, i):
            return jtu.tree_map(lambda x: x[i], cotangent_k)

        def stage(loop):
            i, cotangent_k, cotangent_y0, cotangent_parameters = loop
            cotangent = at(cotangent_k, i)
            if self._has_cache:
                # The first stage, if it has been evaluated in the step before.
                needed = (i > 0) | self.evaluates_first
                mask = lambda x: jnp.where(needed, x, 0)
                cotangent = jtu.tree_map(mask, cotangent)
            cotangent_f = jtu.tree_map(
                lambda x: jnp.where(i == last, x, 0), cotangent_f1
            )
            _, cotangent_point, increment = batch.pull_back(
                lambda point, parameters: self._evaluate(rebuild, i, point, parameters),
                (self.y0**ω + combine(a[i], stages.k) ** ω).ω,
                parameters,
                (cotangent, cotangent_f),
            )
            return (
                i - 1,
                (cotangent_k**ω + _outer(a[i], cotangent_point) ** ω).ω,
                (cotangent_y0**ω + cotangent_point**ω).ω,
                batch.accumulate(cotangent_parameters, increment),
            )

        first = 0
        if self._has_cache:
            first = jnp.where(batch.any(self.evaluates_first), 0, 1)
        loop = (jnp.array(last), cotangent_k, cotangent_y0, cotangent_parameters)
        _, cotangent_k, cotangent_y0, cotangent_parameters = lax.while_loop(
            lambda loop: loop[0] >= first, stage, loop
        )
        if self._has_cache:
            cotangent = jtu.tree_map(
                lambda x: jnp.where(self.evaluates_first, 0, x), at(cotangent_k, 0)
            )

            def product(f0, parameters):
                terms, _, t0, t1 = rebuild(parameters)
                return terms.prod(f0, terms.contr(t0, t1))

            _, cotangent_f0, increment = batch.pull_back(
                product, stages.f0, parameters, cotangent
            )
            cotangent_parameters = batch.accumulate(cotangent_parameters, increment)
            none, _ = cotangent_solver_state
            cotangent_solver_state = (none, cotangent_f0)
        return (
            self.y0,
            self.solver_state,
            cotangent_y0,
            cotangent_solver_state,
            cotangent_parameters,
        )
