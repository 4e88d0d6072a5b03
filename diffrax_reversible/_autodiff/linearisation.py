"""A function of which the residuals of the derivative are kept."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    - `rebuild`: finds the residuals of the derivative from those that are kept: what is
        cheap to compute again.
    - `derivative`: of the residuals and tangents.
    - `varies`: which of those that are kept do.
    - `perturbed`: which leaves of `varying` and `fixed` there are tangents for.
    """

    outputs: "_Traced"
    constant: "_Traced"
    rebuild: jex.Jaxpr
    derivative: jex.Jaxpr
    varies: tuple[bool, ...]
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
        varying_vars = _dependents(jaxpr, jaxpr.invars[:num_varying])
        rebuild = _smaller(jaxpr, num_outputs, varying_vars)
        varies = [var in varying_vars for var in rebuild.invars]
        kept = jaxpr.replace(outvars=[*jaxpr.outvars[:num_outputs], *rebuild.invars])
        silent = silent.replace(outvars=kept.outvars)
        every = list(enumerate(varies, num_outputs))
        return Linearisation(
            _Traced.select(
                kept, closed.consts, [*range(num_outputs), *[i for i, v in every if v]]
            ),
            _Traced.select(silent, closed.consts, [i for i, v in every if not v]),
            rebuild,
            derivative[0],
            tuple(varies),
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
        both = iter(shared), iter(residuals)
        kept = [next(both[varies]) for varies in self.varies]
        consts = jax.core.eval_jaxpr(self.rebuild, [], *kept)
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


# Elementwise, or a matter of shapes: cheaper to compute again than to write and read.
_CHEAP = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh broadcast_in_dim cbrt
    ceil clamp conj convert_element_type copy cos cosh div eq erf erfc exp exp2
    expand_dims expm1 floor ge gt imag integer_pow is_finite le log log1p logistic lt
    max min mul ne neg not one_minus_square or pow real rem reshape round rsqrt select_n
    sign sin sinh sqrt square squeeze stop_gradient sub tan tanh transpose xor
    """.split()
)


def _smaller(jaxpr: jex.Jaxpr, num_outputs: int, varying: set) -> jex.Jaxpr:
    """Finds the residuals, which are what `jaxpr` puts out after its outputs, from those
    of its variables that are to be kept.

    These are the residuals themselves, or what they are computed from by cheap equations,
    which for a layer of a network is its matrix product: whichever are fewer numbers.
    """
    residuals = jaxpr.outvars[num_outputs:]
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    themselves = _unique(residuals)
    kept, again, waiting = [], set(), list(themselves)
    while waiting:
        var = waiting.pop()
        eqn = made_by.get(var)
        # What does not vary is kept but once.
        if var in varying and eqn is not None and _is_cheap(eqn):
            if id(eqn) not in again:
                again.add(id(eqn))
                waiting.extend(_unique(eqn.invars))
        else:
            kept.append(var)
    kept = _unique(kept)
    size = lambda xs: sum(x.aval.size for x in xs if x in varying)
    eqns = [eqn for eqn in jaxpr.eqns if id(eqn) in again]
    if size(kept) >= size(themselves):
        kept, eqns = themselves, []
    return jaxpr.replace(
        constvars=[], invars=kept, outvars=residuals, eqns=eqns, effects=frozenset()
    )


def _unique(variables: Iterable) -> list:
    """Each variable once, and no literals."""
    return list(dict.fromkeys(x for x in variables if not isinstance(x, jex.Literal)))


def _is_cheap(eqn) -> bool:
    inner = list(_inner(eqn))
    if len(eqn.effects) > 0:
        return False
    if len(inner) > 0:
        called = eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call")
        return called and all(_is_cheap(eqn) for jaxpr in inner for eqn in jaxpr.eqns)
    return eqn.primitive.name in _CHEAP


def _dependents(jaxpr: jex.Jaxpr, variables: Iterable) -> set:
    """All variables that depend on these."""
    found = set(variables)
    for eqn in jaxpr.eqns:
        if not found.isdisjoint(_unique(eqn.invars)):
            found.update(eqn.outvars)
    return found


def _inner(eqn) -> Iterator[Any]:
    """The jaxprs inside of an equation."""
    for x in jtu.tree_leaves(list(eqn.params.values())):
        jaxpr = x if hasattr(x, "eqns") else getattr(x, "jaxpr", None)
        if jaxpr is not None and hasattr(jaxpr, "eqns"):
            yield jaxpr


def _equations(jaxpr) -> Iterator[Any]:
    """The equations of a jaxpr, and those inside of them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _equations(inner)
