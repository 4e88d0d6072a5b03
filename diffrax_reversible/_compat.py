"""The only module that imports names which diffrax and equinox do not promise to keep.

Seen the same in diffrax 0.7.0 to 0.7.2 and equinox 0.13.
"""

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

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

# A write-once buffer inside a loop: written in place, also under `jax.vmap`. Rules of
# primitives as functions of pytrees. The floats before and after another one. Identities
# that refuse derivatives. `jnp.any` over every batch that there is, so that a `lax.cond`
# on it stays one branch. All but the rule of batching are names that diffrax, lineax or
# optimistix import as well: where one is missing, there is no solve either.
from equinox.internal import (
    buffer_at_set as buffer_at_set,
    filter_primitive_batching as filter_primitive_batching,
    filter_primitive_bind as filter_primitive_bind,
    filter_primitive_def as filter_primitive_def,
    filter_primitive_jvp as filter_primitive_jvp,
    filter_primitive_transpose as filter_primitive_transpose,
    MaybeBuffer as MaybeBuffer,
    nextafter as nextafter,
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    while_loop as while_loop,
    ω as ω,
)

# Which inputs the outputs of a function depend on.
from jax.interpreters.partial_eval import dce_jaxpr as dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree


CallableToPath = _CallableToPath


def enable_x64(enabled: bool) -> contextlib.AbstractContextManager:
    """64 bits, for as long as a `with` statement lasts."""
    # Before jax 0.8 it was experimental.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    import jax.experimental as experimental

    return experimental.enable_x64(enabled)  # pyright: ignore


def _hide_frames() -> None:
    """Leaves the frames of this package out of the tracebacks that JAX and equinox show,
    as they do with their own."""
    try:
        from jax._src.traceback_util import register_exclusion
    except ImportError:
        return
    here = os.path.dirname(__file__)
    for room in (
        "_adjoint",
        "_autodiff",
        "_controller",
        "_loop",
        "_reversal",
        "_solver",
    ):
        register_exclusion(os.path.join(here, room, ""))


_hide_frames()


def _check_vma() -> Any:
    """Whether the types of arrays inside of `jax.shard_map` say along which axes they
    vary; `None` if this version of JAX has another name for it."""
    try:
        from jax._src.config import _check_vma
    except ImportError:
        return None
    return _check_vma


@contextlib.contextmanager
def _no_concrete_mesh() -> Iterator[None]:
    """As if `jax.shard_map` were not called under `jax.set_mesh`. Where it is,
    constants cannot be computed while tracing, as equinox's enumerations want to
    (diffrax issue 738)."""
    try:
        from jax._src.config import device_context

        previous = device_context.swap_local(None)
    except (ImportError, AttributeError):
        # An unknown version of JAX, whose `jax.set_mesh` may need no help.
        yield
        return
    try:
        yield
    finally:
        device_context.set_local(previous)


@contextlib.contextmanager
def no_varying_types() -> Iterator[None]:
    """Tracing without varying axes in types, as `jax.shard_map(..., check_vma=False)`
    does, and without the mesh of `jax.set_mesh`. Outside of `jax.shard_map` there is
    nothing to do."""
    with contextlib.ExitStack() as stack:
        if len(jax.sharding.get_abstract_mesh().manual_axes) > 0:
            stack.enter_context(_no_concrete_mesh())
            if (check_vma := _check_vma()) is not None:
                stack.enter_context(check_vma(False))
        yield


def varying_axes(aval) -> frozenset[Hashable]:
    """Along which axes of a mesh an array varies: inside of `jax.shard_map`."""
    # Before jax 0.10 it was called `vma`.
    axes = getattr(aval, "mat", None)
    axes = getattr(aval, "vma", frozenset()) if axes is None else axes.varying
    return axes


def with_varying_axes(aval, axes: Iterable[Hashable]):
    """An abstract array like this one, that varies along these axes."""
    if hasattr(aval, "mat"):
        kwargs = dict(manual_axis_type=type(aval.mat)(varying=frozenset(axes)))
    else:
        kwargs = dict(vma=frozenset(axes))
    # That of a constant knows of no mesh.
    mesh, spec = jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * aval.ndim)
    sharding = NamedSharding(mesh, spec)
    try:
        if _check_vma() is None:
            raise TypeError
        return aval.update(sharding=sharding, **kwargs)
    except TypeError as error:
        raise NotImplementedError(
            "`diffeqsolve` inside of `jax.shard_map(..., check_vma=True)` is not supported "
            f"with jax {jax.__version__}. Use `check_vma=False`."
        ) from error


def named_axes(jaxpr) -> tuple[Hashable, ...]:
    """The axes over which there is a collective."""
    # The class is private.
    is_named = lambda effect: type(effect).__name__ == "NamedAxisEffect"
    return tuple(sorted({e.name for e in jaxpr.effects if is_named(e)}, key=str))


def depends(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether any array in `fn(x)` depends on any array in `x`."""
    if len(jtu.tree_leaves(x)) == 0:
        return False
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used)


def with_leading_axes(aval, sizes: tuple[int, ...]):
    """An abstract array like this one with axes put in front, on the same mesh."""
    spec = PartitionSpec(*[None] * len(sizes), *aval.sharding.spec)
    sharding = NamedSharding(aval.sharding.mesh, spec)
    return aval.update(shape=sizes + aval.shape, sharding=sharding)
