"""Orders of `jax.vmap` and `jax.grad`, with parameters shared along some axes; forward
mode; and a solve inside of other transformations, of control flow and of another solve.
The reference is one solve at a time."""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ...helpers import (
    CONTROLLERS,
    directional_difference,
    jit,
    leaf_differences,
    loss,
    normal_like,
    parameters,
    pid,
    quick,
    save_everything,
    save_times,
    step_to,
    tree_difference,
    UNROLLED,
)
from ...reference import Problem, unrolled


_slow = pytest.mark.slow
_ours = ReversibleAdjoint()


#
# Orders of `jax.vmap` and `jax.grad`
#

# `y0` carries both axes, `args` the inner one only, `rate` the outer one only, `shared`
# neither.
_inner = {"y0": 0, "args": 0, "rate": None, "shared": None}
_outer = {"y0": 0, "args": None, "rate": 0, "shared": None}
_outer_size, _inner_size = 2, 3


def _batched():
    y0 = jr.normal(jr.PRNGKey(5), (_outer_size, _inner_size, 2))
    # A frequency: so different that the numbers of steps differ.
    args = jnp.array([0.3, 5.0, 12.0])
    rate = jnp.array([0.8, 1.3])
    return dict(y0=y0, args=args, rate=rate, shared=jnp.array([0.4, -0.7]))


def _oscillating(p):
    def field(t, y, args):
        return jnp.sin(p["rate"] * y[::-1] + p["shared"]) * jnp.cos(args * t)

    return diffrax.ODETerm(field)


def _saves(t0, t1, p):
    ts = jnp.stack([0.8 * t0 + 0.2 * t1, 0.7 * t0 + 0.3 * t1, t1])
    fn = lambda t, y, args: y * p["shared"]
    return diffrax.SaveAt(
        subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True, fn=fn)]
    )


_METHODS = {
    "reversible": (ReversibleALF2(), ReversibleAdjoint()),
    "checkpoints": (ReversibleALF2(), ReversibleAdjoint(checkpoints=2)),
    "coupled": (Reversible(diffrax.Heun()), ReversibleAdjoint()),
    "ReversibleHeun": (diffrax.ReversibleHeun(), ReversibleAdjoint()),
    "symplectic": (diffrax.Bosh3(), SymplecticAdjoint()),
    "symplectic, checkpoints": (
        diffrax.Bosh3(),
        SymplecticAdjoint(keep="stages", checkpoints=3),
    ),
}


def _value(p, method, adjoint=None):
    solver, ours = _METHODS[method]
    adjoint = ours if adjoint is None else adjoint
    return loss(p, solver, pid, _saves, (0.3, 1.9), adjoint, terms=_oscillating)


def _element(p, i, j):
    return {
        "y0": p["y0"][i, j],
        "args": p["args"][j],
        "rate": p["rate"][i],
        "shared": p["shared"],
    }


@pytest.fixture(scope="module")
def tables():
    """The gradient of each solve by itself, for each solver: of shape `(outer, inner)`."""
    found = {}

    def table(method):
        solver, _ = _METHODS[method]
        if solver not in found:
            one = jax.grad(lambda p: _value(p, method, UNROLLED))
            p = _batched()
            stack = lambda *x: jnp.stack(x)
            rows = [
                [one(_element(p, i, j)) for j in range(_inner_size)]
                for i in range(_outer_size)
            ]
            rows = [jtu.tree_map(stack, *row) for row in rows]
            found[solver] = jtu.tree_map(stack, *rows)
        return found[solver]

    return table


def _sum(f):
    return lambda p: jnp.sum(f(p))


def _vmap(f, axes):
    return jax.vmap(f, in_axes=(axes,))


def _total(table, outer, inner):
    """Sums over the axes of `jax.vmap` inside of `jax.grad` that are not carried."""

    def total(key):
        axes = [0] * (outer and _outer[key] is None)
        axes += [1] * (inner and _inner[key] is None)
        return jnp.sum(table[key], tuple(axes))

    return {key: total(key) for key in table}


_ORDERS = {
    # What is found, and which sums are within the gradient.
    "grad of vmap of vmap": (
        lambda f: jax.grad(_sum(_vmap(_vmap(f, _inner), _outer))),
        (True, True),
    ),
    "grad of vmap of vmap, outer first": (
        lambda f: jax.grad(_sum(_vmap(_vmap(f, _outer), _inner | {"y0": 1}))),
        (True, True),
    ),
    "vmap of grad of vmap": (
        lambda f: _vmap(jax.grad(_sum(_vmap(f, _inner))), _outer),
        (False, True),
    ),
    "vmap of vmap of grad": (
        lambda f: _vmap(_vmap(jax.grad(f), _inner), _outer),
        (False, False),
    ),
}
_quick = (
    ("reversible", "grad of vmap of vmap"),
    ("reversible", "vmap of grad of vmap"),
    ("checkpoints", "grad of vmap of vmap, outer first"),
    ("symplectic, checkpoints", "vmap of grad of vmap"),
)


@pytest.mark.parametrize(
    "method, order",
    [
        pytest.param(m, o, marks=() if (m, o) in _quick else _slow)
        for m in _METHODS
        for o in _ORDERS
    ],
)
def test_orders(tables, method, order):
    find, sums = _ORDERS[order]
    found = jit(find(lambda p: _value(p, method)))(_batched())
    assert leaf_differences(found, _total(tables(method), *sums)) < 1e-10


def test_vmap_of_what_is_not_batched(tables):
    """An axis that nothing carries; and one vmap inside of which nothing is shared."""
    p = _element(_batched(), 0, 1)
    f = lambda p: jax.vmap(lambda s: s * _value(p, "reversible"))(jnp.array([1.0, 2.0]))
    found = jit(jax.grad(_sum(f)))(p)
    true = jtu.tree_map(lambda x: 3 * x[0, 1], tables("reversible"))
    assert leaf_differences(found, true) < 1e-10


@pytest.mark.parametrize("stepping", quick(CONTROLLERS, "PID"))
def test_batched_intervals(stepping):
    """`t0`, `t1`, `dt0` and `SaveAt(ts=...)` differ from element to element, and so do
    the directions."""
    intervals = jnp.array([[0.3, 1.9], [1.4, -0.3], [0.1, 0.6]])
    p = _element(_batched(), 0, 0)

    def one(p, interval, adjoint):
        rest = (stepping, _saves, tuple(interval), adjoint)
        return loss(p, ReversibleALF2(), *rest, terms=_oscillating)

    f = lambda p: jnp.sum(jax.vmap(lambda i: one(p, i, _ours))(intervals))
    rows = [jax.grad(one)(p, i, UNROLLED) for i in intervals]
    true = jtu.tree_map(lambda *x: sum(x), *rows)
    assert leaf_differences(jit(jax.grad(f))(p), true) < 1e-10


@pytest.mark.slow
def test_inactive_elements():
    """Elements that are done early must neither be swept on to where the vector field
    is not defined nor touch the gradient."""

    def terms(p):
        def field(t, y, args):
            start, end, scale = args
            ends = jnp.sqrt((t - start + 1e-6) * (end + 1e-6 - t))
            return p * scale * jnp.sqrt(y) + jnp.sin(20 * scale * t) * ends

        return diffrax.ODETerm(field)

    def one(y0, scale, t1, shared, unroll=False):
        t0 = jnp.array(0.2)
        saveat = diffrax.SaveAt(t0=True, t1=True, ts=jnp.array([0.2, 0.2]), steps=2)
        controller = diffrax.PIDController(rtol=1e-4, atol=1e-5)
        rest = (t0, t1, 0.3, y0, (t0, t1, scale))
        options = dict(saveat=saveat, stepsize_controller=controller, max_steps=128)
        if unroll:
            problem = Problem(terms, ReversibleALF4())
            solution = unrolled(problem, shared, *rest, **options)
        else:
            options |= dict(adjoint=_ours)
            solution = diffrax.diffeqsolve(
                terms(shared), ReversibleALF4(), *rest, **options
            )
        ys = jnp.where(jnp.isfinite(solution.ys), solution.ys, 0)
        return jnp.sum(jnp.sin(ys))

    y0 = jnp.array([[1e-3, 2.0], [0.5, 0.02], [1.0, 1.0], [3.0, 0.1]])
    scale = jnp.array([0.1, 3.0, 1.0, 0.5])
    # The third makes no step at all.
    t1 = jnp.array([1.0, 1.2, 0.2, 0.25])
    shared = jnp.array(0.7)

    def total(y0, scale, shared):
        return jnp.sum(jax.vmap(one, (0, 0, 0, None))(y0, scale, t1, shared))

    found = jit(jax.grad(total, (0, 1, 2)))(y0, scale, shared)
    each = jax.grad(lambda *x: one(*x, unroll=True), (0, 1, 3))
    rows = [each(*x, shared) for x in zip(y0, scale, t1)]
    *true, true_shared = jtu.tree_map(lambda *x: jnp.stack(x), *rows)
    assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(found))
    assert leaf_differences(found, (*true, jnp.sum(true_shared))) < 1e-10


@pytest.mark.parametrize(
    "method", ("reversible", pytest.param("symplectic", marks=_slow))
)
def test_named_axis(method):
    """A vector field that communicates along a named axis: as one whose state is that of
    all elements."""
    solver, ours = _METHODS[method]
    weights = jr.normal(jr.PRNGKey(0), (3, 3))
    y0 = jr.normal(jr.PRNGKey(1), (4, 3))
    rest = (0.0, 1.0, 0.13)

    def one(y0, weights):
        def field(t, y, args):
            return jnp.tanh(args @ y + t) - lax.pmean(y, "batch")

        term = diffrax.ODETerm(field)
        options = dict(adjoint=ours, max_steps=16)
        ys = diffrax.diffeqsolve(term, solver, *rest, y0, weights, **options).ys
        return jnp.sum(jnp.sin(ys))

    def terms(p):
        del p
        mean = lambda y: jnp.mean(y, 0, keepdims=True)
        return diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w.T + t) - mean(y))

    def all_at_once(y0, weights):
        return jnp.sum(
            jnp.sin(unrolled(Problem(terms, solver), {}, *rest, y0, weights).ys)
        )

    total = lambda y, w: jnp.sum(jax.vmap(one, (0, None), axis_name="batch")(y, w))
    # In a `jax.grad` inside of `jax.vmap` each element has the cotangents of all.
    inside = jax.vmap(jax.grad(one, (0, 1)), (0, None), axis_name="batch")

    found, (ys, ws) = jit(lambda *x: (jax.grad(total, (0, 1))(*x), inside(*x)))(
        y0, weights
    )
    true = jax.grad(all_at_once, (0, 1))(y0, weights)
    assert leaf_differences(found, true) < 1e-10
    assert leaf_differences((ys, jnp.sum(ws, 0)), true) < 1e-10


#
# Forward mode, and forward over reverse, of a batch and of everything at once
#


def test_jvp():
    p = parameters()
    tangent = normal_like(p, 3)

    def one(p, scale, adjoint):
        scaled = jtu.tree_map(lambda x: scale * x, p)
        interval = (1.4, -0.3)
        return loss(scaled, ReversibleALF2(), pid, save_times, interval, adjoint)

    @jit
    def jvp(scales):
        f = lambda s: jax.jvp(lambda p: one(p, s, _ours), (p,), (tangent,))
        return jax.vmap(f)(scales)

    values, found = jvp(jnp.array([1.0, 0.6]))
    for scale, value, derivative in zip((1.0, 0.6), values, found):
        true_value, grad = jax.value_and_grad(one)(p, scale, UNROLLED)
        true = sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, grad, tangent)))
        assert abs(value - true_value) < 1e-9 * abs(true_value)
        assert abs(derivative - true) < 1e-9 * abs(true)


@_slow
def test_hessian():
    flat, unravel = jfu.ravel_pytree(parameters())

    def f(flat):
        p = unravel(flat)
        return loss(p, ReversibleALF4(), step_to, save_everything, (0.3, 1.9), _ours)

    hessian = jit(jax.jacfwd(jax.grad(f)))(flat)
    assert tree_difference(hessian, hessian.T) < 1e-10
    direction = jr.normal(jr.PRNGKey(4), flat.shape)
    true = directional_difference(jit(jax.grad(f)), flat, direction, 1e-4)
    assert tree_difference(hessian @ direction, true) < 1e-8


@_slow
@pytest.mark.parametrize("method", _METHODS)
def test_hessian_of_batch(method):
    p = _batched()
    f = _sum(_vmap(_vmap(lambda p: _value(p, method), _inner), _outer))
    direction = normal_like(p, 6)

    @jit
    def both(p):
        return jax.jvp(jax.grad(f), (p,), (direction,))

    # Steps that a controller chooses are not differentiated, so smaller differences see
    # less of how they move.
    _, product = both(p)
    true = directional_difference(lambda p: both(p)[0], p, direction, 1e-5)
    assert tree_difference(product, true) < 1e-2


#
# Around one solve
#

_ys = jr.normal(jr.PRNGKey(1), (4, 3))
_weights = jr.normal(jr.PRNGKey(0), (3, 3))


def _tanh(p):
    del p
    return diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y) * jnp.cos(t))


def _loss(y0, weights, adjoint=_ours, ts=(0.3, 1.0), t0=0.0, t1=1.0):
    rest = (t0, t1, (t1 - t0) / 5.7, y0, weights)
    options = dict(saveat=diffrax.SaveAt(ts=jnp.asarray(ts)), max_steps=8)
    if adjoint is UNROLLED:
        solution = unrolled(Problem(_tanh, ReversibleALF2()), {}, *rest, **options)
    else:
        options |= dict(adjoint=adjoint)
        solution = diffrax.diffeqsolve(_tanh({}), ReversibleALF2(), *rest, **options)
    return jnp.sum(jnp.sin(solution.ys))


def _sum_over(ys, weights):
    return jnp.sum(jax.vmap(lambda y: _loss(y, weights))(ys))


def _grad(f):
    return jax.grad(f, (0, 1))


@pytest.fixture(scope="module")
def gradient():
    """Of one solve, and of the sum over all of them."""
    gradients = [_grad(lambda *x: _loss(*x, UNROLLED))(y, _weights) for y in _ys]
    ys, weights = jtu.tree_map(lambda *x: jnp.stack(x), *gradients)
    return gradients[0], (ys, jnp.sum(weights, 0))


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


def _cond(y, weights):
    maybe = lambda y, w: lax.cond(y[0] < 100, _loss, lambda y, w: 0.0, y, w)
    return _grad(maybe)(y, weights)


def _jit_inside(y, weights):
    return _grad(jax.jit(_loss))(y, weights)


_of_one = (_checkpoint, _linearize, _vjp_twice, _batch_of_one, _cond, _jit_inside)


@pytest.mark.parametrize("find", _of_one)
def test_one_solve(find, gradient):
    assert tree_difference(jit(find)(_ys[0], _weights), gradient[0]) < 1e-12


def test_not_compiled(gradient):
    assert tree_difference(_grad(_loss)(_ys[0], _weights), gradient[0]) < 1e-12


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
    assert tree_difference(jit(find)(_ys, _weights), gradient[1]) < 1e-12


@pytest.mark.slow
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
    each = jax.grad(lambda *x: one(*x, UNROLLED), range(5))
    # Of an interval of length zero the length of the first step is not defined.
    finite = [i for i in range(4) if t0[i] != t1[i]]
    for i in finite:
        y, _, *times = each(_ys[i], _weights, ts[i], t0[i], t1[i])
        found_times = [x[i] for x in (found[0], *found[2:])]
        assert tree_difference(found_times, [y, *times]) < 1e-12
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in found)


@pytest.mark.slow
def test_keys_of_each():
    """Stochastic differential equations with a Brownian motion each."""
    keys = jr.split(jr.PRNGKey(4), 4)

    def terms(key):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (3,), key)
        drift = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
        diffusion = diffrax.ControlTerm(lambda t, y, w: jnp.diag(jnp.cos(w @ y)), path)
        return diffrax.MultiTerm(drift, diffusion)

    def one(y, weights, key, unroll=False):
        solver, rest = diffrax.ReversibleHeun(), (0.0, 1.0, 0.2, y, weights)
        if unroll:
            return jnp.sum(unrolled(Problem(terms, solver), key, *rest).ys)
        options = dict(adjoint=_ours, max_steps=8)
        return jnp.sum(diffrax.diffeqsolve(terms(key), solver, *rest, **options).ys)

    def total(ys, weights):
        return jnp.sum(jax.vmap(lambda y, key: one(y, weights, key))(ys, keys))

    found = jit(_grad(total))(_ys, _weights)
    each = _grad(lambda y, w, key: one(y, w, key, unroll=True))
    rows = [each(y, _weights, key) for y, key in zip(_ys, keys)]
    ys, weights = jtu.tree_map(lambda *x: jnp.stack(x), *rows)
    assert tree_difference(found, (ys, jnp.sum(weights, 0))) < 1e-12


def _sum_of_outer(field, ys, weights):
    def outer(y):
        term, solver = diffrax.ODETerm(field), ReversibleALF2()
        rest, options = (0.0, 0.5, 0.25, y, weights), dict(adjoint=_ours, max_steps=4)
        return diffrax.diffeqsolve(term, solver, *rest, **options).ys

    return jnp.sum(jax.vmap(outer)(ys))


@pytest.mark.slow
def test_solve_inside_of_a_vector_field():
    """The axes of one rule are not taken for those of the other: in reverse as in forward
    mode and as finite differences have it."""
    field = lambda t, y, weights: jnp.tanh(_loss(y, weights) + weights @ y)
    total = lambda x: _sum_of_outer(field, *x)
    x, direction = (_ys[:2], _weights), (jnp.cos(_ys[:2]), jnp.sin(_weights))
    grad = jit(jax.grad(total))(x)
    found = sum(map(jnp.vdot, jtu.tree_leaves(grad), jtu.tree_leaves(direction)))
    true = directional_difference(jit(total), x, direction, 1e-3)
    assert abs(found - true) < 1e-8 * abs(true)


@_slow
def test_gradient_inside_of_a_vector_field():
    field = lambda t, y, weights: jnp.tanh(jax.grad(_loss)(y, weights) + y)
    total = lambda x: _sum_of_outer(field, *x)
    x = (_ys[:2], _weights)
    _, found = jit(lambda x: jax.jvp(total, (x,), (x,)))(x)
    true = directional_difference(jit(total), x, x, 1e-3)
    assert abs(found - true) < 1e-8 * abs(true)


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
        rest = (0.0, 1.0, 0.2, y, weights)
        term = diffrax.ODETerm(field)
        return jnp.sum(diffrax.diffeqsolve(term, solver, *rest, adjoint=_ours).ys)

    jax.jit(_grad(value)).lower(_ys[0], _weights)
    assert len(traces) <= 3
