"""A solve inside of other transformations and of control flow; and how often the vector
field is traced for it."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import Reversible, ReversibleAdjoint, ReversibleALF2

from ..helpers import jit, tree_difference


_ours = ReversibleAdjoint()
_reference = diffrax.DirectAdjoint()
_ys = jr.normal(jr.PRNGKey(1), (4, 3))
_weights = jr.normal(jr.PRNGKey(0), (3, 3))


def _loss(y0, weights, adjoint=_ours, ts=(0.3, 1.0), t0=0.0, t1=1.0):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y) * jnp.cos(t)),
        ReversibleALF2(),
        t0,
        t1,
        (t1 - t0) / 6,
        y0,
        weights,
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        adjoint=adjoint,
        max_steps=8,
    )
    return jnp.sum(jnp.sin(solution.ys))


def _sum_over(ys, weights, adjoint=_ours):
    return jnp.sum(jax.vmap(lambda y: _loss(y, weights, adjoint))(ys))


def _grad(f):
    return jax.grad(f, (0, 1))


@pytest.fixture(scope="module")
def gradient():
    """Of one solve, and of the sum over all of them."""
    one = jit(_grad(lambda y, w: _loss(y, w, _reference)))
    gradients = [one(y, _weights) for y in _ys]
    first = lambda *x: jnp.stack(x)
    ys, weights = jtu.tree_map(first, *gradients)
    return gradients[0], (ys, jnp.sum(weights, 0))


#
# One solve
#


def _checkpoint(y, weights):
    return _grad(jax.checkpoint(_loss))(y, weights)


def _linearize(y, weights):
    value, derivative = jax.linearize(_loss, y, weights)
    return jax.linear_transpose(derivative, y, weights)(jnp.ones_like(value))


def _vjp_twice(y, weights):
    _, vjp = jax.vjp(_loss, y, weights)
    (y, weights), (minus_y, minus_weights) = vjp(3.0), vjp(-2.0)
    return y + minus_y, weights + minus_weights


def _batch_of_one(y, weights):
    alone = lambda y, w: jnp.sum(jax.vmap(_loss, (0, None), axis_size=1)(y[None], w))
    return _grad(alone)(y, weights)


def _all_unmapped(y, weights):
    many = lambda y, w: jax.vmap(lambda _: _loss(y, w))(jnp.arange(3.0))[1]
    return _grad(many)(y, weights)


def _cond(y, weights):
    maybe = lambda y, w: lax.cond(y[0] < 100, _loss, lambda y, w: 0.0, y, w)
    return _grad(maybe)(y, weights)


def _jit_inside(y, weights):
    return _grad(jax.jit(_loss))(y, weights)


_of_one = (
    _checkpoint,
    _linearize,
    _vjp_twice,
    _batch_of_one,
    _all_unmapped,
    _cond,
    _jit_inside,
)


@pytest.mark.parametrize("find", _of_one)
def test_one_solve(find, gradient):
    found = jit(find)(_ys[0], _weights)
    assert tree_difference(found, gradient[0]) < 1e-12


def test_not_compiled(gradient):
    assert tree_difference(_grad(_loss)(_ys[0], _weights), gradient[0]) < 1e-12


#
# Several solves
#


def _scan(ys, weights):
    def total(ys, weights):
        add = lambda total, y: (total + _loss(y, weights), None)
        return lax.scan(add, 0.0, ys)[0]

    return _grad(total)(ys, weights)


def _map_of_vmap(ys, weights):
    total = lambda ys, w: jnp.sum(lax.map(lambda y: _sum_over(y, w), ys))
    found, weights = _grad(total)(ys.reshape(2, 2, -1), weights)
    return found.reshape(ys.shape), weights


def _vmap_of_checkpoint(ys, weights):
    one = jax.checkpoint(_loss)
    total = lambda ys, w: jnp.sum(jax.vmap(one, (0, None))(ys, w))
    return _grad(total)(ys, weights)


def _vmap_of_vjp(ys, weights):
    def one(y):
        value, vjp = jax.vjp(_loss, y, weights)
        return vjp(jnp.ones_like(value))

    ys, weights = jax.vmap(one)(ys)
    return ys, jnp.sum(weights, 0)


def _filter_vmap(ys, weights):
    """A model of which one part is shared and another is not."""

    class Model(eqx.Module):
        own: jax.Array
        shared: jax.Array

    def total(model):
        axes = Model(own=eqx.if_array(0), shared=None)
        one = lambda model: _loss(model.own, model.shared)
        return jnp.sum(eqx.filter_vmap(one, in_axes=(axes,))(model))

    found = eqx.filter_grad(total)(Model(ys, weights))
    return found.own, found.shared


_of_several = (_scan, _map_of_vmap, _vmap_of_checkpoint, _vmap_of_vjp, _filter_vmap)


@pytest.mark.parametrize("find", _of_several)
def test_several_solves(find, gradient):
    found = jit(find)(_ys, _weights)
    assert tree_difference(found, gradient[1]) < 1e-12


def test_times_of_each():
    """Save times, and both ends, of each element's own."""
    t0 = jnp.array([0.0, 0.1, 0.4, 1.2])
    t1 = jnp.array([1.0, 0.7, 0.4, 0.2])
    ts = t0[:, None] + jnp.outer(t1 - t0, jnp.array([0.2, 0.8]))
    everything = (_ys, _weights, ts, t0, t1)

    def one(y, weights, ts, t0, t1, adjoint):
        return _loss(y, weights, adjoint, ts, t0, t1)

    def total(*x):
        return jnp.sum(jax.vmap(lambda y, *t: one(y, x[1], *t, _ours))(x[0], *x[2:]))

    found = jit(jax.grad(total, range(5)))(*everything)
    each = jit(jax.grad(lambda *x: one(*x, _reference), range(5)))
    rows = [each(y, _weights, *t) for y, *t in zip(_ys, ts, t0, t1)]
    y, weights, *times = jtu.tree_map(lambda *x: jnp.stack(x), *rows)
    assert tree_difference(found, (y, jnp.sum(weights, 0), *times)) < 1e-12


def test_keys_of_each():
    """Stochastic differential equations with a Brownian motion each."""
    keys = jr.split(jr.PRNGKey(4), 4)

    def one(y, weights, key, adjoint):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (3,), key)
        drift = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
        diffusion = diffrax.ControlTerm(lambda t, y, w: jnp.diag(jnp.cos(w @ y)), path)
        return jnp.sum(
            diffrax.diffeqsolve(
                diffrax.MultiTerm(drift, diffusion),
                diffrax.ReversibleHeun(),
                0.0,
                1.0,
                0.2,
                y,
                weights,
                adjoint=adjoint,
            ).ys
        )

    def total(ys, weights):
        solve = lambda y, key: one(y, weights, key, _ours)
        return jnp.sum(jax.vmap(solve)(ys, keys))

    found = jit(_grad(total))(_ys, _weights)
    each = jit(_grad(lambda y, w, key: one(y, w, key, _reference)))
    rows = [each(y, _weights, key) for y, key in zip(_ys, keys)]
    ys, weights = jtu.tree_map(lambda *x: jnp.stack(x), *rows)
    assert tree_difference(found, (ys, jnp.sum(weights, 0))) < 1e-12


def _sum_of_outer(field, ys, weights, adjoint):
    def outer(y):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            ReversibleALF2(),
            0.0,
            0.5,
            0.25,
            y,
            weights,
            adjoint=adjoint,
            max_steps=4,
        ).ys

    return jnp.sum(jax.vmap(outer)(ys))


@pytest.mark.slow
def test_gradient_inside_of_a_vector_field():
    """The axes of one rule are not taken for those of the other."""

    def find(adjoint):
        def field(t, y, weights):
            return jnp.tanh(jax.grad(_loss)(y, weights, adjoint) + y)

        total = lambda *x: _sum_of_outer(field, *x, adjoint)
        point = (_ys, _weights)
        return jit(lambda: jax.jvp(total, point, point))()

    assert tree_difference(find(_ours), find(_reference)) < 1e-12


def test_solve_inside_of_a_vector_field():
    def find(adjoint):
        def field(t, y, weights):
            return jnp.tanh(_loss(y, weights, adjoint) + weights @ y)

        total = lambda *x: _sum_of_outer(field, *x, adjoint)
        return jit(_grad(total))(_ys, _weights)

    assert tree_difference(find(_ours), find(_reference)) < 1e-12


#
# Tracing
#


@pytest.mark.parametrize(
    "solver", (ReversibleALF2(), Reversible(diffrax.Bosh3()), diffrax.ReversibleHeun())
)
def test_traces_of_the_vector_field(solver):
    """Once by diffrax, which looks at its shape; once by the initialisation of solvers
    that evaluate it; once for all the rest."""
    traces = []

    def field(t, y, weights):
        traces.append(t)
        return jnp.tanh(weights @ y)

    def value(y, weights):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), solver, 0.0, 1.0, 0.2, y, weights, adjoint=_ours
        )
        return jnp.sum(solution.ys)

    jax.jit(_grad(value)).lower(_ys[0], _weights)
    assert len(traces) <= 3
