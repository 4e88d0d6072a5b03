"""Solves on several devices: arrays sharded over a mesh, and `jax.shard_map`."""

import contextlib
import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from diffrax_reversible import (
    InterpolatedAdjoint,
    ReversibleAdjoint,
    ReversibleALF2,
    SymplecticAdjoint,
)

from ...helpers import jit, tree_difference
from ...measure import collectives, mlp


_mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
# With so many hidden units the stages of a step are a loop.
_batch, _width, _hidden = 16, 8, 1024

# With few checkpoints, steps are made again.
_methods = (
    pytest.param(ReversibleALF2(), ReversibleAdjoint(), id="reversible"),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint(checkpoints=4), id="symplectic"),
)


_reversible, _symplectic = _methods


def _pairwise(first, second):
    """Both methods, each with one of two options by default, and the rest slowly."""
    return [
        pytest.param(
            *method.values,
            option,
            id=f"{method.id}-{option}",
            marks=method.marks or (() if option in default else pytest.mark.slow),
        )
        for method, default in ((_reversible, first), (_symplectic, second))
        for option in (False, True)
    ]


def _sums(num_weights):
    """In how many collectives the cotangents of the weights are summed at most."""
    # Before jax 0.7, XLA does not put several into one.
    return 1 if hasattr(jax, "set_mesh") else 2 * num_weights


def _mlp(t, y, weights):
    inwards, outwards = weights
    return outwards @ jnp.tanh(inwards @ y)


def _arguments():
    ys = jr.normal(jr.PRNGKey(3), (_batch, _width))
    return ys, tuple(mlp((_width, _hidden, _width)))


def _solve(y, args, solver, adjoint, *, field=_mlp, adaptive=False, **kwargs):
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        1.0,
        0.1,
        y,
        args,
        adjoint=adjoint,
        stepsize_controller=pid if adaptive else diffrax.ConstantStepSize(),
        max_steps=64,
        **kwargs,
    ).ys


def _loss_of_batch(ys, args, *rest, axis=None, **kwargs):
    solve = lambda y: _solve(y, args, *rest, **kwargs)
    return jnp.sum(jnp.sin(jax.vmap(solve, spmd_axis_name=axis)(ys)))


#
# Sharded arrays
#


_data, _everywhere = P("data"), (P(), P())
# Each device has some of the hidden units, and the field sums over them.
_hidden_units = (P("model", None), P(None, "model"))


def _collectives_of_gradient(loss, arguments, specs):
    """Of the gradient for sharded arguments, which is compared with the ordinary one."""
    gradient = jit(jax.grad(loss, (0, 1)))
    is_spec = lambda x: isinstance(x, P)
    put = lambda spec, x: jax.device_put(x, NamedSharding(_mesh, spec))
    sharded = jtu.tree_map(put, specs, arguments, is_leaf=is_spec)
    compiled = gradient.lower(*sharded).compile()
    assert tree_difference(compiled(*sharded), gradient(*arguments)) < 1e-12
    inside, outside = collectives(compiled)
    print(f"Inside of loops: {inside}\nOutside: {outside}")
    return inside, outside


@pytest.mark.parametrize("solver, adjoint, adaptive", _pairwise((False,), (True,)))
def test_data_parallel(solver, adjoint, adaptive):
    """Devices tell each other in each step whether all are done, and whether any
    restarts, no more, and add up the cotangents of the parameters once."""

    def loss(ys, args):
        options = dict(axis="data", adaptive=adaptive)
        return _loss_of_batch(ys, args, solver, adjoint, **options)

    specs = (_data, _everywhere)
    inside, outside = _collectives_of_gradient(loss, _arguments(), specs)
    assert all(max(sizes) == 1 for _, sizes in inside)
    large = [
        operation for operation, sizes in outside if sum(sizes) >= _width * _hidden
    ]
    assert set(large) == {"all-reduce"} and len(large) <= _sums(2)


@pytest.mark.parametrize("solver, adjoint, both", _pairwise((True,), (False,)))
def test_model_parallel(solver, adjoint, both):
    """What the field itself sums, no more; also with data in parallel."""
    ys = _data if both else P()
    loss = lambda *x: _loss_of_batch(*x, solver, adjoint, axis="data")
    specs = (ys, _hidden_units)
    inside, outside = _collectives_of_gradient(loss, _arguments(), specs)
    assert {operation for operation, _ in inside} == {"all-reduce"}
    state = _batch * _width // (1 if ys == P() else _mesh.shape["data"])
    large = [sizes for _, sizes in inside if max(sizes) > 1]
    # An evaluation forward; one, with its vector-Jacobian product, back. As many where
    # a solver restarts, and where steps are made again.
    assert sum(map(len, large)) == 3 + 3
    assert all(size == state for sizes in large for size in sizes)
    parameters = [sizes for _, sizes in outside if sum(sizes) >= _width * _hidden // 2]
    assert len(parameters) <= (ys != P()) * _sums(2)
    assert len(parameters) >= (ys != P())


@pytest.mark.parametrize("solver, adjoint", (_reversible,))
def test_sharded_state(solver, adjoint):
    """Neighbours tell each other the ends of their pieces, which the field asks for."""

    def field(t, y, args):
        diffusion, rate = args
        neighbours = jnp.roll(y, 1) + jnp.roll(y, -1)
        return diffusion * (neighbours - 2 * y) + rate * jnp.sin(y)

    def loss(y, args):
        return jnp.sum(jnp.sin(_solve(y, args, solver, adjoint, field=field)))

    arguments = jr.normal(jr.PRNGKey(0), (128,)), (jnp.array(0.3), jnp.array(0.4))
    specs = (P(("data", "model")), (P(), P()))
    inside, _ = _collectives_of_gradient(loss, arguments, specs)
    assert {x for x, _ in inside} == {"collective-permute", "all-reduce"}
    assert all(size == 1 for _, sizes in inside for size in sizes)


def test_explicit_axes_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    ys, args = _arguments()
    ys = jax.device_put(ys, NamedSharding(mesh, _data))
    # JAX itself does not let all fields, and all solvers, look at such a state.
    solver, adjoint = diffrax.Bosh3(), SymplecticAdjoint()
    field = lambda t, y, args: -y
    loss = lambda *x: _loss_of_batch(*x, solver, adjoint, field=field)
    with pytest.raises(NotImplementedError, match="Explicit.*AxisType.Auto"):
        jax.eval_shape(loss, ys, args)


#
# `jax.shard_map`
#

# Before jax 0.7 there is no `jax.set_mesh`.
_set_mesh = getattr(jax, "set_mesh", lambda mesh: contextlib.nullcontext())

_shard_map_cases = (
    *_pairwise((True,), (False,)),
    *(
        pytest.param(
            diffrax.Bosh3(),
            InterpolatedAdjoint(8, resolution_rtol=0.1),
            check_vma,
            id=f"interpolated-{check_vma}",
            marks=pytest.mark.slow,
        )
        for check_vma in (False, True)
    ),
)


def _shard_map(f, out_specs, check_vma):
    specs = dict(in_specs=(_data, _everywhere), out_specs=out_specs)
    return jax.shard_map(f, mesh=_mesh, check_vma=check_vma, **specs)


@pytest.mark.parametrize("solver, adjoint, check_vma", _shard_map_cases)
def test_set_mesh(solver, adjoint, check_vma):
    """Also of solves that are not vmapped."""

    def loss(ys, args):
        solve = lambda y: _solve(y, args, solver, adjoint)
        return jnp.sum(jnp.sin(solve(ys[0]) + solve(ys[1])))

    def grad_inside(ys, args):
        ys, args = jax.grad(loss, (0, 1))(ys, args)
        return ys, args if check_vma else lax.psum(args, "data")

    def total(ys, args):
        return lax.psum(loss(ys, args), "data")

    ys, args = _arguments()
    arguments = ys[:8], args
    solve = lambda y, args: _solve(y, args, solver, adjoint)

    def unsharded(ys, args):
        ys = jax.vmap(solve, (0, None))(ys, args)
        return jnp.sum(jnp.sin(jnp.sum(ys.reshape(4, 2, -1), 1)))

    expected = jit(jax.grad(unsharded, (0, 1)))(*arguments)
    with _set_mesh(_mesh):
        inside = jit(_shard_map(grad_inside, (_data, P()), check_vma))(*arguments)
        outside = jit(jax.grad(_shard_map(total, P(), check_vma), (0, 1)))(*arguments)
    assert tree_difference(inside, expected) < 1e-12
    assert tree_difference(outside, expected) < 1e-12


@pytest.mark.parametrize("solver, adjoint, check_vma", _shard_map_cases)
def test_shard_map(solver, adjoint, check_vma):
    """Inside, devices tell each other nothing in any step."""

    def loss(ys, args):
        return _loss_of_batch(ys, args, solver, adjoint, adaptive=True)

    def grad_inside(ys, args):
        ys, args = jax.grad(loss, (0, 1))(ys, args)
        # With `check_vma` the cotangent of what is everywhere the same is a sum already.
        return ys, args if check_vma else lax.psum(args, "data")

    def total(ys, args):
        return lax.psum(loss(ys, args), "data")

    arguments = _arguments()
    expected = jit(jax.grad(loss, (0, 1)))(*arguments)
    inside = jit(_shard_map(grad_inside, (_data, P()), check_vma))
    assert tree_difference(inside(*arguments), expected) < 1e-12
    outside = jit(jax.grad(_shard_map(total, P(), check_vma), (0, 1)))
    outside = outside.lower(*arguments).compile()
    assert tree_difference(outside(*arguments), expected) < 1e-12
    in_loops, _ = collectives(outside)
    assert in_loops == []


@pytest.mark.parametrize("solver, adjoint, check_vma", _pairwise((False,), (True,)))
def test_field_that_communicates(solver, adjoint, check_vma):
    def field(t, y, args):
        return lax.psum(_mlp(t, y, args), "model")

    def loss(field, y, args):
        return jnp.sum(jnp.sin(_solve(y, args, solver, adjoint, field=field)))

    def value(y, args):
        # All have the same, but the type of a solution says that it varies with `args`.
        return lax.pmean(loss(field, y, args), "model")

    ys, args = _arguments()
    mapped = jax.shard_map(
        value,
        mesh=_mesh,
        in_specs=(P(), _hidden_units),
        out_specs=P(),
        check_vma=check_vma,
    )
    found = jit(jax.grad(mapped, (0, 1)))(ys[0], args)
    expected = jit(jax.grad(ft.partial(loss, _mlp), (0, 1)))(ys[0], args)
    assert tree_difference(found, expected) < 1e-12


def test_jvp_in_shard_map():
    solver, adjoint = ReversibleALF2(), ReversibleAdjoint()

    def loss(ys, args):
        return _loss_of_batch(ys, args, solver, adjoint, throw=False)

    def total(ys, args):
        return lax.psum(loss(ys, args), "data")

    arguments = _arguments()
    tangents = jtu.tree_map(jnp.cos, arguments)
    jvp = lambda f: jit(lambda *x: jax.jvp(f, x, tangents))(*arguments)
    found, expected = jvp(_shard_map(total, P(), True)), jvp(loss)
    assert tree_difference(found, expected) < 1e-12


@pytest.mark.parametrize("check_vma", (False, True))
def test_failure_in_shard_map(check_vma):
    """Raised where one element of the batch has failed, on one device."""

    def value(ys, rates):
        def solve(y, rate):
            field = lambda t, y, rate: rate * y
            adjoint = SymplecticAdjoint()
            kwargs = dict(field=field, adaptive=True)
            return _solve(y, rate, diffrax.Bosh3(), adjoint, **kwargs)

        return jax.vmap(solve)(ys, rates)

    specs = dict(in_specs=(_data, _data), out_specs=_data, check_vma=check_vma)
    f = eqx.filter_jit(jax.shard_map(value, mesh=_mesh, **specs))
    ys, rates = jnp.ones((8, 1)), jnp.ones(8)
    assert tree_difference(f(ys, rates)[:, 0], jnp.exp(rates)[:, None]) < 1e-2
    for _ in range(2):
        with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver"):
            f(ys, rates.at[5].set(-1e4))


@pytest.mark.parametrize("throw", (False, True))
def test_result_in_shard_map(throw):
    """It is a plain `diffrax.RESULTS`, that raises what it is asked to."""

    def value(ys, args):
        solution = diffrax.diffeqsolve(
            *(diffrax.ODETerm(_mlp), ReversibleALF2(), 0.0, 1.0, 0.1, ys[0], args),
            adjoint=ReversibleAdjoint(),
            throw=throw,
        )
        assert type(solution.result) is type(diffrax.RESULTS.successful)
        return solution.ys

    jax.eval_shape(_shard_map(value, _data, True), *_arguments())


def test_monitor_in_shard_map():
    """It is told of the gradient on each device."""
    reports = []
    adjoint = ReversibleAdjoint(monitor=reports.append)

    def loss(rate, ys):
        field = lambda t, y, rate: rate * y
        solve = lambda y: _solve(y, rate, ReversibleALF2(), adjoint, field=field)
        return jnp.sum(jax.vmap(solve)(ys))

    specs = dict(in_specs=(P(), _data), out_specs=P())
    gradient = jit(jax.shard_map(jax.grad(loss), mesh=_mesh, **specs))
    ys = jnp.ones((8, 1))
    found = gradient(jnp.array(0.5), ys)
    jax.effects_barrier()
    assert tree_difference(found, 8 * jnp.exp(0.5)) < 1e-2
    assert len(reports) == _mesh.size


def test_refused_in_shard_map():
    def closes_over(ys, args):
        # The solver must not look at the field before the solve.
        field = lambda t, y, args: _mlp(t, y, args) + ys[0]
        y = jnp.ones(_width)
        return _solve(y, args, diffrax.Bosh3(), SymplecticAdjoint(), field=field)

    with pytest.raises(NotImplementedError, match="closes over.*`args`"):
        jax.eval_shape(_shard_map(closes_over, _data, True), *_arguments())
