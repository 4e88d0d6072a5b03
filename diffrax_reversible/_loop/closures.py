"""Closure conversion: what a callable closes over becomes a leaf of it, so that it can
be differentiated."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
from diffrax import (
    AbstractTerm,
    ControlTerm,
    Event,
    MultiTerm,
    ODETerm,
    SaveAt,
    SubSaveAt,
)
from jaxtyping import PyTree

from .._compat import CallableToPath, save_y, WrapTerm
from .._types import Args, RealScalarLike, Y


def _is_term(x) -> bool:
    return isinstance(x, AbstractTerm)


def _has_vector_field(term) -> bool:
    """Whether a term calls its vector field as diffrax does."""
    return type(term) in (ODETerm, ControlTerm)


def _convert(fn: Callable, t, y, args) -> Callable:
    # Of a function that closes over nothing equinox would make no jaxpr; but with one
    # it is traced here for the last time.
    return eqx.filter_closure_convert(lambda *inputs: fn(*inputs), t, y, args)


class _Recorder(eqx.Module):
    """A vector field that is converted when it is first called."""

    vector_field: Callable
    converted: list = eqx.field(static=True)

    def __call__(self, t, y, args):
        if len(self.converted) == 0:
            self.converted.append(_convert(self.vector_field, t, y, args))
        return self.converted[0](t, y, args)


def convert_terms(
    terms: PyTree[AbstractTerm],
    t: RealScalarLike,
    y: Y,
    args: Args,
    step: Callable[[PyTree[AbstractTerm]], Any],
) -> PyTree[AbstractTerm]:
    """The same terms, with every array that a vector field or a control closes over as a
    leaf. `step` makes a step with given terms: it tells which part of `y` each of
    several terms is a function of."""

    def map_terms(fn, terms):
        def walk(term):
            if isinstance(term, WrapTerm):
                return WrapTerm(walk(term.term), term.direction)
            if isinstance(term, MultiTerm):
                return MultiTerm(*[walk(x) for x in term.terms])
            if _has_vector_field(term):
                where = lambda x: x.vector_field
                return eqx.tree_at(where, term, fn(term.vector_field))
            return term

        return jtu.tree_map(walk, terms, is_leaf=_is_term)

    def convert_control(term):
        if type(term) is ControlTerm and isinstance(term.control, CallableToPath):
            fn = eqx.filter_closure_convert(term.control.fn, t, t)
            return eqx.tree_at(lambda x: x.control.fn, term, fn)
        return term

    terms = jtu.tree_map(convert_control, terms, is_leaf=_has_vector_field)
    if isinstance(terms, AbstractTerm):
        return map_terms(lambda fn: _convert(fn, t, y, args), terms)
    recorders = []

    def record(fn):
        recorders.append(_Recorder(fn, []))
        return recorders[-1]

    recording = map_terms(record, terms)
    # Not as an argument: what vector fields hold must not be traced.
    eqx.filter_eval_shape(lambda: step(recording))
    each = iter(recorders)

    def converted(fn):
        recorder = next(each)
        return recorder.converted[0] if recorder.converted else fn

    return map_terms(converted, terms)


def is_subsaveat(x) -> bool:
    return isinstance(x, SubSaveAt)


def subsaveats_of(saveat: SaveAt) -> list[SubSaveAt]:
    return jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)


def convert_saveat(saveat: SaveAt, t: RealScalarLike, y: Y, args: Args) -> SaveAt:
    """The same, with every `SubSaveAt(fn=...)` converted."""

    def convert(sub):
        fn = sub.fn if sub.fn is save_y else _convert(sub.fn, t, y, args)
        return eqx.tree_at(lambda s: s.fn, sub, fn)

    subs = jtu.tree_map(convert, saveat.subs, is_leaf=is_subsaveat)
    return eqx.tree_at(lambda s: s.subs, saveat, subs)


def convert_event(event: Event, kwargs: dict[str, Any], t, y, args) -> Event:
    """An event for use inside of the loop, where it is not differentiated: what its
    conditions close over, and are handed by diffrax, is made constant."""

    def hoist(cond_fn):
        converted = eqx.filter_closure_convert(
            lambda t, y, args: cond_fn(t, y, args, **kwargs), t, y, args
        )
        dynamic, static = eqx.partition(converted, eqx.is_array)
        converted = eqx.combine(lax.stop_gradient(dynamic), static)
        return _Condition(converted)

    cond_fn = jtu.tree_map(hoist, event.cond_fn, is_leaf=callable)
    return eqx.tree_at(lambda e: e.cond_fn, event, cond_fn)


class _Condition(eqx.Module):
    fn: Callable

    def __call__(self, t, y, args, **kwargs):
        del kwargs
        return self.fn(t, y, args)
