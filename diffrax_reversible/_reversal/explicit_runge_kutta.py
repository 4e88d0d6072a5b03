"""The reversal of an explicit Runge-Kutta step whose start is known, stage by stage."""

import functools as ft
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractSolver
from jaxtyping import PyTree

from .._compat import ω
from .._solver.runge_kutta.tableau import full_tableau_of
from .._solver.updates.repeat import is_small
from .._tree import add, combine, outer, scale, where
from .._types import BoolScalarLike, Y
from .base import AbstractReversal
from .stages import at_most_once, evaluate_stage, no_stages, StageResiduals, Stages


class ExplicitRungeKuttaReversal(AbstractReversal):
    """The reversal of one particular step, of which the start is known.

    - `kind`: the class of the solver.
    - `y0`: where the step starts.
    - `solver_state`: that of the solver at its start. What it has cached may be zero,
        unless `cached`.
    - `evaluates_first`: whether the step evaluates its first stage.
    - `cached`: whether the first stage is to be taken from `solver_state`; `None` if it
        never is.
    - `stages`: if they are known.
    - `residuals`: if they are.
    """

    kind: type[AbstractSolver] = eqx.field(static=True)
    y0: Y
    solver_state: PyTree
    evaluates_first: BoolScalarLike
    cached: BoolScalarLike | None
    stages: Stages | None
    residuals: StageResiduals | None

    @property
    def _has_cache(self) -> bool:
        return self.solver_state is not None

    def undo(self, step, end):
        del end
        inputs, state0 = step.inputs, self.solver_state
        if self._has_cache:
            # Whatever it has cached it can evaluate.
            evaluates, f0 = state0
            if self.cached is not None:
                evaluates = ~self.cached
            state0 = (jnp.asarray(evaluates) | self.evaluates_first, f0)
        _, _, dense_info, _, _ = inputs.solver.step(
            inputs.terms,
            inputs.t0,
            inputs.t1,
            self.y0,
            inputs.args,
            state0,
            step.made_jump,
        )
        return self.y0, self.solver_state, dense_info

    def _evaluate(self, step, i, point, parameters):
        """The vector field times the control, and the vector field, at stage `i`."""
        inputs = step.inputs_of(parameters)
        terms, args, t0, t1 = inputs.terms, inputs.args, inputs.t0, inputs.t1
        c = full_tableau_of(self.kind).c
        c = jnp.asarray(c, jnp.result_type(t0, t1))[i]
        return evaluate_stage(terms, args, (t0, t1), c, point, self._has_cache)

    def _recompute(self, step) -> Stages:
        """All stages but the last, which no other stage is a function of."""
        if self.stages is not None:
            return self.stages
        if self._unrolls(step):
            return self._recompute_each(step)
        a = jnp.asarray(full_tableau_of(self.kind).a)
        f0 = None
        if self._has_cache:
            _, f0 = self.solver_state

        def stage(i, stages):
            point = self._point(i, stages.k)
            k, f = self._evaluate(step, i, point, step.parameters)
            if self._has_cache:
                f = where(i == 0, f, stages.f0)
            if self.cached is not None:
                known = (_product(step, f0, step.parameters), f0)
                k, f = where((i == 0) & self.cached, known, (k, f))
            write = lambda x, xs: xs.at[i].set(x)
            return Stages(jtu.tree_map(write, k, stages.k), f)

        stages = Stages(no_stages(self.kind, self.y0), f0)
        last = len(a) - 1
        number = max(last, 1) if self._has_cache else last
        if number == 0:
            return stages
        return lax.fori_loop(0, number, stage, stages)

    def _recompute_each(self, step) -> Stages:
        """The same without a loop: every stage is an array of its own, and only what is
        not zero is added up."""
        f0, last = None, len(full_tableau_of(self.kind).b) - 1
        if self._has_cache:
            _, f0 = self.solver_state
        cached, each = f0, []
        for i in range(max(last, 1) if self._has_cache else last):
            k, f = self._evaluate(step, i, self._point(i, each), step.parameters)
            if i == 0 and self.cached is not None:
                known = (_product(step, cached, step.parameters), cached)
                k, f = where(self.cached, known, (k, f))
            f0 = f if i == 0 and self._has_cache else f0
            each.append(k)
        return Stages(each, f0)

    def _point(self, i, k) -> Y:
        """Where stage `i` is evaluated. `k`: a list of stages, or these along an axis."""
        a = full_tableau_of(self.kind).a
        if not isinstance(k, list):
            return (self.y0**ω + combine(jnp.asarray(a)[i], k) ** ω).ω
        return add(self.y0, *[scale(x, k) for x, k in zip(a[i], k) if x != 0])

    def _unrolls(self, step) -> bool:
        """Whether loops over stages are unrolled."""
        evaluate = lambda y: self._evaluate(step, 0, y, step.parameters)
        return is_small(evaluate, self.y0)

    def pull_back(self, step, end, cotangent, batch, total):
        del end
        tableau, parameters = full_tableau_of(self.kind), step.parameters
        a, last = jnp.asarray(tableau.a), len(tableau.b) - 1
        stages, unrolls = self._recompute(step), self._unrolls(step)
        at = lambda xs, i: jtu.tree_map(lambda x: x[i], xs)
        dense = cotangent.dense_info or {}
        cotangent_y1 = add(cotangent.y, dense.get("y1"))
        cotangent_y0 = add(cotangent_y1, dense.get("y0"))
        cotangent_k = add(outer(tableau.b, cotangent_y1), dense.get("k"))
        each = ft.partial(_each, len(tableau.b))
        if unrolls:
            cotangent_k = [
                add(scale(b, cotangent_y1), k)
                for b, k in zip(tableau.b, each(dense.get("k")))
            ]
            if stages is not None and not isinstance(stages.k, list):
                stages = Stages(each(stages.k), stages.f0)
        cotangent_f1: Any = None
        if self._has_cache:
            _, cotangent_f1 = cotangent.solver_state
        first = 1 if self._has_cache else 0

        def evaluate_and_pull_back(i, cotangents, total):
            point = self.y0
            # With residuals it is the first stage.
            if self.residuals is None:
                point = self._point(i, stages.k)
            return batch.vjp(
                lambda point, parameters: self._evaluate(step, i, point, parameters),
                *(point, parameters, cotangents, total),
            )

        def pull_back(i, cotangents, total):
            if self.residuals is None:
                return evaluate_and_pull_back(i, cotangents, total)
            # Linear in both, and so the same at zero.
            tangent = ft.partial(self.residuals.tangent, step, i - first)
            point, zeros = jtu.tree_map(jnp.zeros_like, (self.y0, parameters))
            return batch.vjp(tangent, point, zeros, cotangents, total)

        def stage(pull_back, loop, i):
            cotangent_k, cotangent_y0, total = loop
            cotangent = cotangent_k[i] if unrolls else at(cotangent_k, i)
            cotangent_f = where(i == last, cotangent_f1, 0)
            if unrolls and i != last:
                cotangent_f = jtu.tree_map(lambda _: None, cotangent_f1)
            if self._has_cache and not (unrolls and i > 0):
                # The first stage, if it has been evaluated in the step before.
                cotangent = where((i > 0) | self.evaluates_first, cotangent, 0)
            cotangents = (cotangent, cotangent_f)
            _, cotangent_point, total = pull_back(i, cotangents, total)
            if unrolls:
                cotangent_k = [
                    add(x, scale(w, cotangent_point)) if w != 0 else x
                    for w, x in zip(tableau.a[i], cotangent_k)
                ]
            else:
                cotangent_k = add(cotangent_k, outer(a[i], cotangent_point))
            return (cotangent_k, add(cotangent_y0, cotangent_point), total), None

        loop = (cotangent_k, cotangent_y0, total)
        later = ft.partial(stage, pull_back)
        if unrolls:
            for i in reversed(range(first, last + 1)):
                loop, _ = later(loop, i)
        else:
            numbers = np.arange(first, last + 1)
            loop, _ = lax.scan(later, loop, numbers, reverse=True)
        if self._has_cache:
            at_start = ft.partial(stage, evaluate_and_pull_back)
            loop = at_most_once(
                batch.any(self.evaluates_first), lambda loop: at_start(loop, 0)[0], loop
            )
        cotangent_k, cotangent_y0, total = loop
        cotangent_solver_state = cotangent.solver_state
        if self._has_cache:
            evaluates = jnp.asarray(self.evaluates_first)
            _, cotangent_f0, total = batch.vjp(
                lambda f0, parameters: _product(step, f0, parameters),
                stages.f0,
                parameters,
                where(~evaluates, cotangent_k[0] if unrolls else at(cotangent_k, 0), 0),
                total,
            )
            none, _ = cotangent_solver_state
            cotangent_solver_state = (none, cotangent_f0)
        carry = (self.y0, self.solver_state)
        return carry, cotangent_y0, cotangent_solver_state, total


def _each(number: int, xs: PyTree) -> list:
    """The entries along the leading axis of `xs`, which may be `None`."""
    return [jtu.tree_map(lambda x: x[i], xs) for i in range(number)]


def _product(step, f0, parameters):
    inputs = step.inputs_of(parameters)
    return inputs.terms.prod(f0, inputs.terms.contr(inputs.t0, inputs.t1))
