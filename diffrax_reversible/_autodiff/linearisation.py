"""A function of which the residuals of the derivative are kept."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import dce_jaxpr


@dataclasses.dataclass(frozen=True, eq=False)
class Linearisation:
    """A traced function `fn(varying, fixed)`, and its derivative as a function of what was
    kept of it, its residuals; compared by identity.

    Residuals that depend on `fixed` alone are the same for every evaluation, and so are
    found once, by `shared`.

    - `outputs`, `constant`: that find the outputs and the residuals that vary, and those
        that do not; with the inputs that they use.
    - `derivative`: of the residuals, in the order of `places`, and tangents.
    - `perturbed`: which leaves of `varying` and `fixed` there are tangents for.
    """

    outputs: "_Traced"
    constant: "_Traced"
    derivative: jex.Jaxpr
    places: tuple[tuple[bool, int], ...]
    perturbed: tuple[bool, ...]
    tree: Any
    num_outputs: int

    @staticmethod
    def trace(
        fn: Callable, varying: PyTree, fixed: PyTree, perturbed: PyTree
    ) -> "Linearisation | None":
        """`perturbed`: like `(varying, fixed)`, whether there are tangents. `None` if
        the function has a `jax.custom_vjp`, whose residuals are its own."""
        leaves, inputs_tree = jtu.tree_flatten((varying, fixed))
        is_perturbed = tuple(inputs_tree.flatten_up_to(perturbed))
        derivative, tree = [], []

        def evaluate_and_linearise(leaves):
            def evaluate(xs):
                xs = iter(xs)
                every = [next(xs) if p else x for p, x in zip(is_perturbed, leaves)]
                out, structure = jtu.tree_flatten(fn(*inputs_tree.unflatten(every)))
                tree.append(structure)
                return list(map(jnp.asarray, out))

            xs = [x for p, x in zip(is_perturbed, leaves) if p]
            outputs, tangent = jax.linearize(evaluate, xs)
            closed = jax.make_jaxpr(tangent)(list(map(jnp.zeros_like, xs)))
            derivative.append(closed.jaxpr)
            return outputs, list(map(jnp.asarray, closed.consts))

        closed, shapes = jax.make_jaxpr(evaluate_and_linearise, return_shape=True)(
            leaves
        )
        if any(eqn.primitive.name == "custom_lin" for eqn in _equations(derivative[0])):
            return None
        num_outputs, num_varying = len(shapes[0]), len(jtu.tree_leaves(varying))
        jaxpr, silent = closed.jaxpr, _without_effects(closed.jaxpr)
        # Each residual once; and whether it varies.
        places, seen, which = [], {}, ([], [])
        for i, var in enumerate(jaxpr.outvars[num_outputs:], num_outputs):
            key = i if isinstance(var, jex.Literal) else var
            if key not in seen:
                one = [j == i for j in range(len(jaxpr.outvars))]
                _, used = dce_jaxpr(silent, one)
                varies = any(used[:num_varying])
                seen[key] = (varies, len(which[varies]))
                which[varies].append(i)
            places.append(seen[key])
        constant, varies = which
        return Linearisation(
            _Traced.select(jaxpr, closed.consts, [*range(num_outputs), *varies]),
            _Traced.select(silent, closed.consts, constant),
            derivative[0],
            tuple(places),
            is_perturbed,
            tree[0],
            num_outputs,
        )

    def evaluate(self, varying: PyTree, fixed: PyTree) -> tuple[PyTree, list[Array]]:
        """`fn(varying, fixed)`, and its residuals that vary."""
        outputs = self.outputs(jtu.tree_leaves((varying, fixed)))
        n = self.num_outputs
        return jtu.tree_unflatten(self.tree, outputs[:n]), outputs[n:]

    def shared(self, varying: PyTree, fixed: PyTree) -> list[Array]:
        """The residuals that do not vary. Of `varying` only the shapes are used."""
        return self.constant(jtu.tree_leaves((varying, fixed)))

    def tangent(
        self, residuals: list[Array], shared: list[Array], tangents: list[Array]
    ) -> PyTree:
        """The tangent of `fn`, from those of its perturbed leaves."""
        both = shared, residuals
        consts = [both[varies][i] for varies, i in self.places]
        outputs = jax.core.eval_jaxpr(self.derivative, consts, *tangents)
        return jtu.tree_unflatten(self.tree, list(map(jnp.asarray, outputs)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """A part of a traced function, and which inputs it uses."""

    jaxpr: jex.Jaxpr
    consts: tuple
    used: tuple[bool, ...]

    @staticmethod
    def select(jaxpr: jex.Jaxpr, consts: Sequence, outputs: list[int]) -> "_Traced":
        """The part that finds these outputs."""
        wanted = [i in outputs for i in range(len(jaxpr.outvars))]
        jaxpr, used = dce_jaxpr(jaxpr, wanted)
        return _Traced(jaxpr, tuple(consts), tuple(used))

    def __call__(self, leaves: list) -> list[Array]:
        leaves = [x for x, used in zip(leaves, self.used) if used]
        outputs = jax.core.eval_jaxpr(self.jaxpr, self.consts, *leaves)
        return list(map(jnp.asarray, outputs))


def _without_effects(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """The jaxpr, of which an equation is only worth what is computed from it."""
    eqns = [eqn.replace(effects=frozenset()) for eqn in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns, effects=frozenset())


def _equations(jaxpr) -> Iterator[Any]:
    """The equations of a jaxpr, and those inside of them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for x in jtu.tree_leaves(list(eqn.params.values())):
            inner = x if hasattr(x, "eqns") else getattr(x, "jaxpr", None)
            if inner is not None and hasattr(inner, "eqns"):
                yield from _equations(inner)
