"""The only module that imports names which diffrax and equinox do not promise to keep.

Seen the same in diffrax 0.7.0 to 0.7.2 and equinox 0.13.
"""

import functools as ft
from collections.abc import Callable, Hashable, Iterable

import jax
import jax.tree_util as jtu

# Whether terms contain a Brownian motion, and one that is drawn anew at every look.
from diffrax._heuristics import is_sde as is_sde, is_unsafe_sde as is_unsafe_sde

# The state of the loop's buffers, one for each `SubSaveAt`.
from diffrax._integrate import SaveState as SaveState

# Default `SaveAt(fn=...)`: recognised by identity, since its pull-back is free.
from diffrax._saveat import save_y as save_y

# The path that `ControlTerm` makes of a callable. The terms that `diffeqsolve` wraps to
# integrate backwards in time.
from diffrax._term import _CallableToPath, WrapTerm as WrapTerm

# A write-once buffer inside a loop: written in place, also under `jax.vmap`. The floats
# before and after another one. `jnp.any` over every batch that there is, so that a
# `lax.cond` on it stays one branch.
from equinox.internal import (
    buffer_at_set as buffer_at_set,
    MaybeBuffer as MaybeBuffer,
    nextafter as nextafter,
    nondifferentiable_backward as nondifferentiable_backward,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    while_loop as while_loop,
    ω as ω,
)

# Whether the types of arrays inside of `jax.shard_map` say along which axes they vary.
from jax._src.config import _check_vma

# Which inputs the outputs of a function depend on.
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree


CallableToPath = _CallableToPath

# Tracing without varying axes in types: what `jax.shard_map(..., check_vma=False)` does.
no_varying_types = ft.partial(_check_vma, False)


def varying_axes(aval) -> frozenset[Hashable]:
    """Along which axes of a mesh an array varies: inside of `jax.shard_map`."""
    return aval.mat.varying


def with_varying_axes(aval, axes: Iterable[Hashable]):
    """An abstract array like this one, that varies along these axes."""
    # That of a constant knows of no mesh.
    mesh, spec = jax.sharding.get_abstract_mesh(), jax.P(*[None] * aval.ndim)
    return aval.update(
        sharding=jax.NamedSharding(mesh, spec),
        manual_axis_type=type(aval.mat)(varying=frozenset(axes)),
    )


def depends(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether any array in `fn(x)` depends on any array in `x`."""
    if len(jtu.tree_leaves(x)) == 0:
        return False
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used)


def with_leading_axes(aval, sizes: tuple[int, ...]):
    """An abstract array like this one with axes put in front, on the same mesh."""
    spec = jax.P(*[None] * len(sizes), *aval.sharding.spec)
    sharding = aval.sharding.update(spec=spec)
    return aval.update(shape=sizes + aval.shape, weak_type=False, sharding=sharding)
