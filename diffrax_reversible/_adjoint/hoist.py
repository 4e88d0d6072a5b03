"""Making what a callable closes over visible, so that it can be differentiated."""

from collections.abc import Callable

import equinox as eqx
import jax.tree_util as jtu
from diffrax import AbstractTerm, ControlTerm, MultiTerm, ODETerm, SaveAt, SubSaveAt
from jaxtyping import PyTree

from .._compat import save_y, WrapTerm
from .._types import Args, RealScalarLike, Y


def _is_term(x) -> bool:
    return isinstance(x, AbstractTerm)


def hoist_terms(
    terms: PyTree[AbstractTerm], t: RealScalarLike, y: Y, args: Args
) -> PyTree[AbstractTerm]:
    """The same terms, with every array that a vector field closes over as a leaf."""

    def hoist(term):
        if isinstance(term, WrapTerm):
            return WrapTerm(hoist(term.term), term.direction)
        if isinstance(term, MultiTerm):
            return MultiTerm(*[hoist(x) for x in term.terms])
        if isinstance(term, ODETerm | ControlTerm):
            vector_field = eqx.filter_closure_convert(term.vector_field, t, y, args)
            return eqx.tree_at(lambda x: x.vector_field, term, vector_field)
        return term

    return jtu.tree_map(hoist, terms, is_leaf=_is_term)


def is_subsaveat(x) -> bool:
    return isinstance(x, SubSaveAt)


def hoist_fns(
    saveat: SaveAt, t: RealScalarLike, y: Y, args: Args
) -> list[Callable[[RealScalarLike, Y, Args], PyTree]]:
    """The same, for every `SubSaveAt(fn=...)`."""
    subsaveats = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    return [
        s.fn if s.fn is save_y else eqx.filter_closure_convert(s.fn, t, y, args)
        for s in subsaveats
    ]


def without_fns(saveat: SaveAt) -> SaveAt:
    """`saveat` with `None` for every `fn`: what is left has no closures."""
    subs = jtu.tree_map(
        lambda s: eqx.tree_at(lambda s: s.fn, s, None),
        saveat.subs,
        is_leaf=is_subsaveat,
    )
    return eqx.tree_at(lambda s: s.subs, saveat, subs, is_leaf=lambda x: x is None)
