"""The differentiation rule on several devices."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from diffrax_reversible import _compat
from diffrax_reversible._autodiff.rule import with_reverse_sweep
from diffrax_reversible._autodiff.shard_map import without_varying_axes
from diffrax_reversible._autodiff.sweep import Inputs

from ..measure import collectives
from .test_rule import _difference, _reference, _Toy


_mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
_n = jnp.array(3)


def _data():
    ys = jr.normal(jr.PRNGKey(0), (8, 2))
    p = {"W": jr.normal(jr.PRNGKey(1), (2, 2)), "h": jnp.array(0.3)}
    return ys, p | {"unused": jnp.ones(3)}


def _run(y, p, n, step=None):
    toy = _Toy() if step is None else _Toy(step)

    def solve(forget, y, p, n, throw):
        return with_reverse_sweep(toy, Inputs(y, p, n))["y"]

    options = dict(y=y, p=p, n=n, throw=False)
    return without_varying_axes(solve, lambda outputs: outputs, options)


def _loss(run, axis=None):
    def f(ys, p):
        mapped = jax.vmap(lambda y: run(y, p, _n), spmd_axis_name=axis)
        return jnp.sum(jnp.sin(mapped(ys)))

    return f


def test_sharded_batch():
    ys, p = _data()
    put = lambda spec, tree: jax.device_put(tree, NamedSharding(_mesh, spec))
    find = lambda run, axis: jax.jit(jax.grad(_loss(run, axis), (0, 1)))
    args = put(P("data"), ys), put(P(), p)
    compiled = find(_run, "data").lower(*args).compile()
    assert _difference(compiled(*args), find(_reference, None)(ys, p)) < 1e-12
    in_loops, _ = collectives(compiled)
    assert in_loops == []


@pytest.mark.parametrize("check_vma", (False, True))
def test_shard_map(check_vma):
    ys, p = _data()

    def total(ys, p):
        return lax.psum(_loss(_run)(ys, p), "data")

    specs = dict(in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma)
    f = jax.shard_map(total, mesh=_mesh, **specs)
    args = _data()
    tangents = jtu.tree_map(jnp.cos, args)

    def all_of(f):
        grad = jax.grad(f, (0, 1))

        # Before jax 0.8, constants of `jax.shard_map` under `jax.jit` are mixed up.
        def run(args, tangents):
            return grad(*args), *(jax.jvp(x, args, tangents) for x in (f, grad))

        return jax.jit(run)(args, tangents)

    assert _difference(all_of(f), all_of(_loss(_reference))) < 1e-12


@pytest.mark.parametrize("check_vma", (False, True))
def test_communication(check_vma):
    """The step sums over a mesh axis."""
    ys, p = _data()

    def step(reduce, y, p):
        return y + p["h"] * jnp.tanh(reduce(p["W"] @ y))

    psum = lambda x: lax.psum(x, "model")
    # Each of the two has a matrix of its own.
    both = jnp.stack([p["W"], -2 * p["W"] ** 2])

    def ours(y, W):
        run = lambda y, p, n: _run(y, p, n, lambda *x: step(psum, *x))
        return lax.pmean(jnp.sum(jnp.sin(run(y, p | {"W": W[0]}, _n))), "model")

    def reference(y, both):
        for _ in range(3):
            y = step(lambda x: x, y, p | {"W": jnp.sum(both, 0)})
        return jnp.sum(jnp.sin(y))

    specs = dict(in_specs=(P(), P("model")), out_specs=P(), check_vma=check_vma)
    mapped = jax.shard_map(ours, mesh=_mesh, **specs)
    find = lambda f: jax.jit(jax.grad(f, (0, 1)))(ys[0], both)
    assert _difference(find(mapped), find(reference)) < 1e-12


def test_unknown_version_of_jax(monkeypatch):
    """What a private name of JAX is missing for is refused, and nothing else."""
    monkeypatch.setattr(_compat, "_check_vma", lambda: None)
    # Of a shape for which JAX has not cached any types.
    ys, p = jnp.ones((12, 2)), _data()[1]
    specs = dict(in_specs=(P("data"), P()), out_specs=P("data"))

    def value(ys, p):
        return jax.vmap(lambda y: _run(y, p, _n))(ys)

    for check_vma in (False, True):
        f = jax.shard_map(value, mesh=_mesh, check_vma=check_vma, **specs)
        if check_vma:
            with pytest.raises(NotImplementedError, match="check_vma=False"):
                jax.eval_shape(f, ys, p)
        else:
            assert jax.eval_shape(f, ys, p).shape == ys.shape
