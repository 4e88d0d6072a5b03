"""The stages of an explicit Runge-Kutta step, and what their derivatives are made of."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree

from .._autodiff.linearisation import Linearisation
from .._solver.runge_kutta.tableau import diagonal_tableaus_of, has_several_tableaus
from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .base import ReverseStep, StepInputs


class Stages(eqx.Module):
    """What is evaluated in a step.

    - `k`: the vector field times the control at every stage, along a leading axis; a
        tuple of these if terms have a tableau each. `None` if the residuals of its
        derivatives are kept in its place.
    - `f0`: the vector field at the first stage; `None` if the solver does not have it
        from the step before (FSAL).
    """

    k: PyTree
    f0: PyTree


def no_stages(kind: type[AbstractSolver], y: Y) -> PyTree:
    """Zeros in the shape of `Stages.k`."""

    def of_one(tableau):
        s = len(tableau.b)
        zeros = lambda x: jnp.zeros((s, *jnp.shape(x)), jnp.result_type(x))
        return jtu.tree_map(zeros, y)

    each = tuple(map(of_one, diagonal_tableaus_of(kind)))
    return each if has_several_tableaus(kind) else each[0]


def at_most_once(pred: BoolScalarLike, fn: Callable, x: PyTree) -> PyTree:
    """`fn(x)` if `pred`, and else `x`: by a loop of at most one turn, which unlike
    `lax.cond` copies nothing."""
    _, x = lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.array(False), fn(loop[1])),
        (jnp.asarray(pred), x),
    )
    return x


def evaluate_stage(
    terms: PyTree[AbstractTerm],
    args: Args,
    interval: tuple[RealScalarLike, RealScalarLike],
    c: RealScalarLike,
    point: Y,
    with_slope: bool,
) -> tuple[Y, PyTree]:
    """The vector field times the control at a stage of the step over `interval`, and the
    vector field if `with_slope`.

    - `c`: where the stage is in the step: 0 at its start, 1 at its end.
    """
    t0, t1 = interval
    t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
    control = terms.contr(t0, t1)
    if not with_slope:
        return terms.vf_prod(t, point, args, control), None
    f = terms.vf(t, point, args)
    return terms.prod(f, control), f


def _leaves_of(inputs: StepInputs, c: RealScalarLike, point: Y):
    """All that a stage depends on: what is another at every stage, and what is not; and
    what of it is not an array."""
    fixed, static = eqx.partition((inputs.terms, inputs.args), eqx.is_array)
    return (point, (inputs.t0, inputs.t1), c), fixed, static


def linearise_stage(
    inputs: StepInputs,
    point: Y,
    with_slope: bool,
    perturbed: tuple[PyTree, PyTree],
    moves: bool,
) -> Linearisation:
    """The derivative of `evaluate_stage`.

    - `perturbed`: like the terms and `args` of `inputs`, whether each array is
        differentiated.
    - `moves`: whether the times are.
    """
    varying, fixed, static = _leaves_of(inputs, jnp.zeros_like(inputs.t0), point)

    def evaluate(varying, fixed):
        point, interval, c = varying
        terms, args = eqx.combine(fixed, static)
        return evaluate_stage(terms, args, interval, c, point, with_slope)

    is_none = lambda x: x is None
    is_perturbed = lambda x, p: None if x is None else p is True
    fixed_perturbed = jtu.tree_map(is_perturbed, fixed, perturbed, is_leaf=is_none)
    point_perturbed = jtu.tree_map(lambda _: True, point)
    varying_perturbed = (point_perturbed, (moves, moves), False)
    linearisation = Linearisation.trace(
        evaluate, varying, fixed, (varying_perturbed, fixed_perturbed)
    )
    if linearisation is None:
        raise NotImplementedError(
            '`adjoint=SymplecticAdjoint(keep="residuals")` does not support a '
            "`jax.custom_vjp` in the vector field, whose residuals are its own. Use "
            '`keep="stages"`.'
        )
    return linearisation


def evaluate_linearised(
    linearisation: Linearisation, inputs: StepInputs, c: RealScalarLike, point: Y
) -> tuple[tuple[Y, PyTree], list[Array]]:
    """`evaluate_stage`, and the residuals that vary."""
    varying, fixed, _ = _leaves_of(inputs, c, point)
    return linearisation.evaluate(varying, fixed)


def shared_residuals(
    linearisation: Linearisation, inputs: StepInputs, point: Y
) -> list[Array]:
    """The residuals that are the same at all stages."""
    varying, fixed, _ = _leaves_of(inputs, jnp.zeros_like(inputs.t0), point)
    return linearisation.shared(varying, fixed)


class StageResiduals(eqx.Module):
    """What the derivatives of the stages of a step are made of.

    - `values`: with a leading axis of steps, and one of the stages that each of them
        itself evaluates.
    - `row`: which of the steps it is.
    - `shared`: what is the same at all stages.
    """

    values: list[Array]
    row: IntScalarLike
    shared: list[Array]
    linearisation: Linearisation = eqx.field(static=True)

    def tangent(
        self, step: ReverseStep, i: IntScalarLike, point: Y, parameters: PyTree
    ) -> PyTree:
        """The tangent of stage `i`, from those of the point and the parameters."""
        which = self.linearisation.perturbed

        def leaves_of(parameters):
            inputs = step.inputs_of(parameters)
            varying, fixed, _ = _leaves_of(inputs, jnp.zeros_like(inputs.t0), point)
            leaves = jtu.tree_leaves((varying, fixed))
            return [x for x, is_perturbed in zip(leaves, which) if is_perturbed]

        _, tangents = jax.jvp(leaves_of, (step.parameters,), (parameters,))
        points = jtu.tree_leaves(point)
        values = [x[self.row, i] for x in self.values]
        return self.linearisation.tangent(
            values, self.shared, [*points, *tangents[len(points) :]]
        )
