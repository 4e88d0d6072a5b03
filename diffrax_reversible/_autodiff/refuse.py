"""Refusing a derivative at trace time, rather than returning a wrong one."""

import functools as ft

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _refuse(message, x):
    return x


@_refuse.defjvp
def _refuse_jvp(message, primals, tangents):
    raise NotImplementedError(message)


def refuse_derivative(tree: PyTree, message: str) -> PyTree:
    """The identity; raises `NotImplementedError(message)` where it is differentiated
    with respect to any floating-point array in `tree`."""
    return jtu.tree_map(
        lambda x: _refuse(message, x) if eqx.is_inexact_array(x) else x, tree
    )
