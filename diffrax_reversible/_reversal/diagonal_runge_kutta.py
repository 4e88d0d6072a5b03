"""The reversal of a diagonally implicit Runge-Kutta step whose start is known, stage by
stage."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from diffrax import AbstractSolver
from jaxtyping import Array, PyTree

from .._autodiff.batch import Batch
from .._compat import ω
from .._solver.runge_kutta.tableau import (
    diagonal_tableaus_of,
    DiagonalTableau,
    has_several_tableaus,
)
from .._tree import add, combine, outer, scale, where
from .._types import BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .base import AbstractReversal, ReverseStep
from .failure import distrusted, has_failed
from .stages import at_most_once, evaluate_stage, Stages


class LinearSystems(eqx.Module):
    """How the systems of the stages are solved.

    - `solver`: `None`: that of the root finder.
    - `tags`: what is known of the matrix of the systems.
    """

    solver: lx.AbstractLinearSolver | None
    tags: frozenset[object] = eqx.field(static=True)

    def solve(
        self,
        step: ReverseStep,
        matrix: lx.AbstractLinearOperator,
        vector: PyTree,
        size: Array,
    ) -> PyTree:
        """Solves the system; NaN where that fails.

        - `size`: of the cotangents of the solve.
        """
        solver = self.solver
        if solver is None:
            root_finder = getattr(step.inputs.solver, "root_finder", None)
            solver = getattr(root_finder, "linear_solver", None)
        if solver is None:
            solver = lx.AutoLinearSolver(well_posed=None)
        solution = lx.linear_solve(matrix, vector, solver, throw=False)
        failed = solution.result != lx.RESULTS.successful
        return distrusted(solution.value, size, failed & jnp.asarray(step.active))


class DiagonalRungeKuttaReversal(AbstractReversal):
    r"""The reversal of one particular step, of which the start and the stages are known.

    Stage $i$ solves $k_i = h f(Y_i)$, where $Y_i = P_i + a_{ii} k_i$ and $P_i$ is made of
    the stages before. With the cotangent $g_i$ of $k_i$, and $J = h\, \partial f /
    \partial Y_i$, the cotangent of $P_i$ is $J^\top w$, and that of the parameters is
    that of $h f$, pulled back by $w$, where

    $(I - a_{ii} J)^\top w = g_i$

    by the implicit function theorem. If the stage has other outputs than this -- those of
    terms with an explicit tableau, and the vector field at the end of the step, which is
    the first stage of the next one -- that pull back to $r$ at $Y_i$, then $a_{ii} r$ is
    added on the right, and $r$ to the cotangent of $P_i$.

    - `kind`: the class of the solver.
    - `y0`: where the step starts.
    - `solver_state`: that of the solver at its start. What it has cached may be zero,
        unless `cached`.
    - `evaluates_first`: whether the step evaluates its first stage.
    - `stages`: at least those that the others are functions of.
    - `systems`: how those of the stages are solved.
    - `size`: of the cotangents of the solve.
    """

    kind: type[AbstractSolver] = eqx.field(static=True)
    y0: Y
    solver_state: PyTree
    evaluates_first: BoolScalarLike
    stages: Stages
    systems: LinearSystems
    size: Array

    @property
    def _has_cache(self) -> bool:
        return self.solver_state is not None

    def undo(self, step, end):
        del step
        dense_info = dict(y0=self.y0, y1=end.y)
        if hasattr(self.kind, "tableau"):
            dense_info |= dict(k=self.stages.k)
        return self.y0, self.solver_state, dense_info

    def _evaluate(self, step, number, tableau, i, point, parameters):
        """The vector field times the control, and the vector field, of one of the terms
        at stage `i`."""
        inputs = step.inputs_of(parameters)
        args, t0, t1 = inputs.args, inputs.t0, inputs.t1
        term: Any = _each(self.kind, inputs.terms, "terms")[number]
        c = jnp.asarray(tableau.c, jnp.result_type(t0, t1))[i]
        return evaluate_stage(term, args, (t0, t1), c, point, self._has_cache)

    def pull_back(self, step, end, cotangent, batch, total):
        del end
        tableaus = diagonal_tableaus_of(self.kind)
        last = len(tableaus[0].b) - 1
        dense = cotangent.dense_info or {}
        cotangent_y1 = add(cotangent.y, dense.get("y1"))
        cotangent_y0 = add(cotangent_y1, dense.get("y0"))
        of_each = lambda x: _each(self.kind, x)
        dense_k = of_each(dense["k"]) if "k" in dense else [None] * len(tableaus)
        cotangent_k = tuple(
            add(outer(tableau.b, cotangent_y1), k)
            for tableau, k in zip(tableaus, dense_k)
        )
        ks, cotangent_f1 = of_each(self.stages.k), [None] * len(tableaus)
        if self._has_cache:
            _, cotangent_f1 = cotangent.solver_state
            cotangent_f1 = of_each(cotangent_f1)
        at = lambda xs, i: jtu.tree_map(lambda x: x[i], xs)

        def stage(solves, loop, i):
            cotangent_k, cotangent_y0, total = loop
            point, each = self.y0, []
            for number, tableau in enumerate(tableaus):
                a = jnp.asarray(tableau.a + np.diag(tableau.diagonal))
                point = (point**ω + combine(a[i], ks[number]) ** ω).ω
                found = at(cotangent_k[number], i)
                if self._has_cache:
                    # The first stage, if it has been evaluated in the step before.
                    found = where((i > 0) | self.evaluates_first, found, 0)
                each.append([found, where(i == last, cotangent_f1[number], 0)])
            cotangent_point = None
            # What has no system to be solved comes first.
            for number in sorted(
                range(len(tableaus)), key=lambda j: _is_implicit(tableaus[j])
            ):
                tableau = tableaus[number]

                def evaluate(point, parameters):
                    return self._evaluate(step, number, tableau, i, point, parameters)

                if solves and _is_implicit(tableau):
                    each[number][0] = self._solve(
                        step, tableau, i, evaluate, point, each[number], cotangent_point
                    )
                _, found, total = batch.vjp(
                    evaluate, point, step.parameters, tuple(each[number]), total
                )
                cotangent_point = add(cotangent_point, found)
            cotangent_k = tuple(
                add(xs, outer(jnp.asarray(tableau.a)[i], cotangent_point))
                for tableau, xs in zip(tableaus, cotangent_k)
            )
            return (cotangent_k, add(cotangent_y0, cotangent_point), total), None

        loop = (cotangent_k, cotangent_y0, total)
        later = np.arange(1 if self._has_cache else 0, last + 1)
        loop, _ = lax.scan(ft.partial(stage, True), loop, later, reverse=True)
        if self._has_cache:
            # That of a solver that hands on its last stage is explicit.
            at_start = ft.partial(stage, False)
            loop = at_most_once(
                batch.any(self.evaluates_first), lambda loop: at_start(loop, 0)[0], loop
            )
        cotangent_k, cotangent_y0, total = loop
        cotangent_solver_state = cotangent.solver_state
        if self._has_cache:

            def product(f0, parameters):
                inputs = step.inputs_of(parameters)
                terms: Any = _each(self.kind, inputs.terms, "terms")
                control = lambda term: term.contr(inputs.t0, inputs.t1)
                return tuple(x.prod(f, control(x)) for x, f in zip(terms, of_each(f0)))

            evaluates = jnp.asarray(self.evaluates_first)
            _, cotangent_f0, total = batch.vjp(
                product,
                self.stages.f0,
                step.parameters,
                where(~evaluates, at(cotangent_k, 0), 0),
                total,
            )
            none, _ = cotangent_solver_state
            cotangent_solver_state = (none, cotangent_f0)
        carry = (self.y0, self.solver_state)
        return carry, cotangent_y0, cotangent_solver_state, total

    def _solve(self, step, tableau, i, evaluate, point, cotangents, others):
        """The cotangent of a stage, with what it has of itself by being implicit.

        - `cotangents`: of the stage, and of the vector field.
        - `others`: the cotangent of the point from the other terms.
        """
        cotangent_k, cotangent_f = cotangents
        diagonal, dtypes = jnp.asarray(tableau.diagonal)[i], point
        k_of = lambda point: evaluate(point, step.parameters)[0]
        f_of = lambda point: evaluate(point, step.parameters)[1]

        def solve():
            right = others
            if cotangent_f is not None:

                def pull_back():
                    _, pull = jax.vjp(f_of, point)
                    return pull(cotangent_f)[0]

                last = len(tableau.b) - 1
                zeros = lambda: jtu.tree_map(jnp.zeros_like, point)
                right = add(right, lax.cond(i == last, pull_back, zeros))
            if right is not None:
                right = scale(diagonal, right)

            def residual(x, _):
                x = _from_real(x, dtypes)
                moved = (point**ω + scale(diagonal, x) ** ω).ω
                return _to_real((x**ω - k_of(moved) ** ω).ω)

            zeros = _to_real(jtu.tree_map(jnp.zeros_like, point))
            is_real = jtu.tree_structure(zeros) == jtu.tree_structure(point)
            if len(self.systems.tags) > 0 and not is_real:
                raise ValueError(
                    "`SymplecticAdjoint(linear_tags=...)` does not support a complex "
                    "state, whose systems are those of its real and imaginary parts. Use "
                    "`adjoint=SymplecticAdjoint()` without `linear_tags`."
                )
            tags = self.systems.tags
            matrix = lx.JacobianLinearOperator(residual, zeros, tags=tags)
            vector = _to_real(_conj(add(cotangent_k, right)))
            transposed: Any = lx.linearise(matrix).T
            matrix = _made_in_place(transposed, step.number + i)
            x = self.systems.solve(step, matrix, vector, self.size)
            return _conj(_from_real(x, dtypes))

        if np.all(tableau.diagonal[1 if self._has_cache else 0 :] != 0):
            return solve()
        return lax.cond(diagonal != 0, solve, lambda: cotangent_k)


def _made_in_place(
    matrix: lx.FunctionLinearOperator, number: IntScalarLike
) -> lx.AbstractLinearOperator:
    """The same, but XLA does not move what it makes of unit vectors out of the loops over
    steps and stages, to keep it there: several times the size of the matrix.

    - `number`: positive, and another one at each turn of these.
    """

    def product(vector):
        return matrix.mv(where(number > 0, vector, 0))

    return lx.FunctionLinearOperator(product, matrix.in_structure(), matrix.tags)


def _is_implicit(tableau: DiagonalTableau) -> bool:
    """Whether any stage is implicit."""
    return bool(np.any(tableau.diagonal != 0))


def _each(kind: type[AbstractSolver], x: Any, attribute: str | None = None) -> tuple:
    """What belongs to each of the tableaus."""
    if not has_several_tableaus(kind):
        return (x,)
    return tuple(x if attribute is None else getattr(x, attribute))


#
# A vector field need not be holomorphic, so that its Jacobian is not a complex matrix.
#


def _conj(x: PyTree) -> PyTree:
    """What pairs with the real and the imaginary part of a variable, from its cotangent;
    and back."""
    return jtu.tree_map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, x)


def _to_real(x: PyTree) -> PyTree:
    def one(x):
        return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x

    return jtu.tree_map(one, x)


def _from_real(x: PyTree, like: PyTree) -> PyTree:
    def one(like, x):
        return lax.complex(*x) if jnp.iscomplexobj(like) else x

    return jtu.tree_map(one, like, x)


def first_slope(
    inputs: Any,
    t0: RealScalarLike,
    y0: Y,
    f0: PyTree,
    evaluates_first: BoolScalarLike,
    batch: Batch,
) -> PyTree:
    """The vector field at the start of a step: what has been handed on, unless the step
    `evaluates_first`.

    - `inputs`: that have the terms and their `args`.
    """

    def evaluate():
        f = inputs.terms.vf(t0, y0, inputs.args)
        return where(jnp.asarray(evaluates_first), f, f0)

    return lax.cond(batch.any(evaluates_first), evaluate, lambda: f0)


def solve_stages(
    step: ReverseStep,
    y0: Y,
    y1: Y,
    f0: PyTree,
    evaluates_first: BoolScalarLike,
    size: Array,
    batch: Batch,
) -> Stages:
    """The stages of a step from `y0`, by the solver itself.

    - `f0`: what the step before has handed on; `None` if nothing.
    - `size`: of the cotangents of the solve.
    """
    inputs = step.inputs
    kind = type(inputs.solver)
    if not hasattr(kind, "tableau"):
        # One stage, which the end of the step tells.
        k = jtu.tree_map(lambda a, b: (b - a)[None], y0, y1)
        return Stages(k, None)
    solver_state = None
    if f0 is not None:
        # Cheaper than to have the root finder find an explicit stage.
        f0 = first_slope(inputs, inputs.t0, y0, f0, evaluates_first, batch)
        solver_state = (jnp.array(False), f0)
    _, _, dense_info, _, result = inputs.solver.step(
        inputs.terms, inputs.t0, inputs.t1, y0, inputs.args, solver_state, False
    )
    failed = has_failed(result)
    if failed is False:
        return Stages(dense_info["k"], f0)
    failed = failed & jnp.asarray(step.active)
    return Stages(distrusted(dense_info["k"], size, failed), f0)
