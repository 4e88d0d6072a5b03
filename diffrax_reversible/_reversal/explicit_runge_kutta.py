"""The reversal of an explicit Runge-Kutta step whose start is known, stage by stage."""

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
from .._tree import add, combine, outer, where
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


def no_stages(kind: type[AbstractSolver], y: Y) -> PyTree:
    """Zeros in the shape of `Stages.k`."""
    s = len(full_tableau_of(kind).b)
    zeros = lambda x: jnp.zeros((s, *jnp.shape(x)), jnp.result_type(x))
    return jtu.tree_map(zeros, y)


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
    """

    kind: type[AbstractSolver] = eqx.field(static=True)
    y0: Y
    solver_state: PyTree
    evaluates_first: BoolScalarLike
    cached: BoolScalarLike | None
    stages: Stages | None

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
        c = jnp.asarray(full_tableau_of(self.kind).c, jnp.result_type(t0, t1))[i]
        t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
        control = terms.contr(t0, t1)
        if not self._has_cache:
            return terms.vf_prod(t, point, args, control), None
        f = terms.vf(t, point, args)
        return terms.prod(f, control), f

    def _recompute(self, step) -> Stages:
        """All stages but the last, which no other stage is a function of."""
        if self.stages is not None:
            return self.stages
        a = jnp.asarray(full_tableau_of(self.kind).a)
        f0 = None
        if self._has_cache:
            _, f0 = self.solver_state

        def stage(i, stages):
            point = (self.y0**ω + combine(a[i], stages.k) ** ω).ω
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
        return lax.fori_loop(0, number, stage, stages, unroll=self._unrolls(step))

    def _unrolls(self, step) -> bool:
        """Whether loops over stages are unrolled."""
        evaluate = lambda y: self._evaluate(step, 0, y, step.parameters)
        return is_small(evaluate, self.y0)

    def pull_back(self, step, end, cotangent, batch, total):
        del end
        tableau, parameters = full_tableau_of(self.kind), step.parameters
        a, last = jnp.asarray(tableau.a), len(tableau.b) - 1
        stages = self._recompute(step)
        dense = cotangent.dense_info or {}
        cotangent_y1 = add(cotangent.y, dense.get("y1"))
        cotangent_y0 = add(cotangent_y1, dense.get("y0"))
        cotangent_k = add(outer(tableau.b, cotangent_y1), dense.get("k"))
        cotangent_f1: Any = None
        if self._has_cache:
            _, cotangent_f1 = cotangent.solver_state
        at = lambda xs, i: jtu.tree_map(lambda x: x[i], xs)

        def stage(loop, i):
            cotangent_k, cotangent_y0, total = loop
            cotangent = at(cotangent_k, i)
            if self._has_cache:
                # The first stage, if it has been evaluated in the step before.
                cotangent = where((i > 0) | self.evaluates_first, cotangent, 0)
            _, cotangent_point, total = batch.vjp(
                lambda point, parameters: self._evaluate(step, i, point, parameters),
                (self.y0**ω + combine(a[i], stages.k) ** ω).ω,
                parameters,
                (cotangent, where(i == last, cotangent_f1, 0)),
                total,
            )
            cotangent_k = add(cotangent_k, outer(a[i], cotangent_point))
            return (cotangent_k, add(cotangent_y0, cotangent_point), total), None

        loop = (cotangent_k, cotangent_y0, total)
        later = np.arange(1 if self._has_cache else 0, last + 1)
        loop, _ = lax.scan(
            stage, loop, later, reverse=True, unroll=self._unrolls(step) or 1
        )
        if self._has_cache:
            # A loop of at most one turn, which unlike `lax.cond` copies nothing.
            _, loop = lax.while_loop(
                lambda loop: loop[0],
                lambda loop: (jnp.array(False), stage(loop[1], 0)[0]),
                (jnp.asarray(batch.any(self.evaluates_first)), loop),
            )
        cotangent_k, cotangent_y0, total = loop
        cotangent_solver_state = cotangent.solver_state
        if self._has_cache:
            evaluates = jnp.asarray(self.evaluates_first)
            _, cotangent_f0, total = batch.vjp(
                lambda f0, parameters: _product(step, f0, parameters),
                stages.f0,
                parameters,
                where(~evaluates, at(cotangent_k, 0), 0),
                total,
            )
            none, _ = cotangent_solver_state
            cotangent_solver_state = (none, cotangent_f0)
        carry = (self.y0, self.solver_state)
        return carry, cotangent_y0, cotangent_solver_state, total


def _product(step, f0, parameters):
    inputs = step.inputs_of(parameters)
    return inputs.terms.prod(f0, inputs.terms.contr(inputs.t0, inputs.t1))
