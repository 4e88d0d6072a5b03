import diffrax
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4, ReversibleYoshida4

from ..helpers import (
    CONTROLLERS,
    directional_difference,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    normal_like,
    parameters,
    pid,
    quick,
    save_dense,
    save_everything,
    save_times,
    solve,
    step_to,
    tree_difference,
)


_ours = ReversibleAdjoint()
_reference = diffrax.RecursiveCheckpointAdjoint()


#
# Orders of `jax.vmap` and `jax.grad`. The reference is always one solve at a time.
#

# `y0` carries both axes, `closed_over` the inner one only, `args` the outer one only,
# the parameters of the term and of `fn` neither.
_inner = {"y0": 0, "args": None, "term": None, "closed_over": 0, "fn": None}
_outer = {"y0": 0, "args": 0, "term": None, "closed_over": None, "fn": None}
_outer_size, _inner_size = 2, 3


def _batched_parameters():
    def batch(tree, *sizes):
        def one(x):
            noise = jr.normal(jr.PRNGKey(5), (*sizes, *x.shape))
            return jnp.broadcast_to(x, noise.shape) + noise

        return jtu.tree_map(one, tree)

    p = parameters()
    return p | {
        "y0": batch(p["y0"], _outer_size, _inner_size),
        "args": batch(p["args"], _outer_size),
        # A frequency: so different that the numbers of steps differ.
        "closed_over": jnp.array([0.3, 5.0, 12.0]),
    }


def _loss(p, adjoint=_ours, saves=save_times):
    return loss(p, ReversibleALF4(), pid, saves, (0.3, 1.9), adjoint)


def _vmap(f, axes):
    return jax.vmap(f, in_axes=(axes,))


def _sum(f):
    return lambda p: jnp.sum(f(p))


def _first(p):
    """The parameters of the first outer element."""
    return jtu.tree_map(
        lambda axis, tree: tree if axis is None else jtu.tree_map(lambda x: x[0], tree),
        _outer,
        p,
        is_leaf=lambda x: x is None,
    )


@pytest.fixture(scope="module")
def table():
    """The gradient of each solve by itself: leaves of shape `(outer, inner, ...)`."""

    def spread(tree, *axes):
        sizes = (_outer_size, _inner_size)
        index = tuple(slice(None) if a else None for a in axes)
        shape = lambda x: sizes + x.shape[sum(axes) :]
        return jtu.tree_map(lambda x: jnp.broadcast_to(x[index], shape(x)), tree)

    carried = {
        key: (_outer[key] is not None, _inner[key] is not None) for key in _outer
    }

    @jit
    def grads(p):
        p = {key: spread(tree, *carried[key]) for key, tree in p.items()}
        one = jax.grad(lambda p: _loss(p, _reference))
        return lax.map(lambda p: lax.map(one, p), p)

    return grads(_batched_parameters())


def _total(table, outer, inner):
    """Sums over the axes of `jax.vmap` inside of `jax.grad` that are not carried."""

    def total(key):
        axes = [0] * (outer and _outer[key] is None)
        axes += [1] * (inner and _inner[key] is None)
        return jtu.tree_map(lambda x: jnp.sum(x, tuple(axes)), table[key])

    return {key: total(key) for key in table}


def test_steps_of_the_batch_differ():
    p = _batched_parameters()

    def num_steps(y0, closed_over):
        p_one = _first(p) | {"y0": y0, "closed_over": closed_over}
        solution = solve(p_one, ReversibleALF4(), pid, save_times, (0.3, 1.9), _ours)
        return solution.stats["num_accepted_steps"]

    found = jit(jax.vmap(num_steps))(_first(p)["y0"], p["closed_over"])
    assert len(set(found.tolist())) == _inner_size


def test_grad_of_vmap(table):
    found = jit(jax.grad(_sum(_vmap(_loss, _inner))))(_first(_batched_parameters()))
    row = jtu.tree_map(lambda x: x[:1], table)
    true = jtu.tree_map(
        lambda x, f: x[0] if x.shape != f.shape else x, _total(row, False, True), found
    )
    assert leaf_differences(found, true) < 1e-10


def test_vmap_of_grad(table):
    found = jax.vmap(jit(jax.grad(_loss)), in_axes=(_inner,))(
        _first(_batched_parameters())
    )
    assert leaf_differences(found, jtu.tree_map(lambda x: x[0], table)) < 1e-10


@pytest.mark.parametrize("inner_first", (True, False))
def test_grad_of_vmap_of_vmap(table, inner_first):
    if inner_first:
        f = _vmap(_vmap(_loss, _inner), _outer)
    else:
        f = _vmap(_vmap(_loss, _outer), _inner | {"y0": 1})
    found = jit(jax.grad(_sum(f)))(_batched_parameters())
    assert leaf_differences(found, _total(table, True, True)) < 1e-10


def test_vmap_of_grad_of_vmap(table):
    f = _vmap(jax.grad(_sum(_vmap(_loss, _inner))), _outer)
    found = jit(f)(_batched_parameters())
    assert leaf_differences(found, _total(table, False, True)) < 1e-10


def test_vmap_of_vmap_of_grad(table):
    f = _vmap(_vmap(jax.grad(_loss), _inner), _outer)
    found = jit(f)(_batched_parameters())
    assert leaf_differences(found, table) < 1e-10


def test_vmap_of_what_is_not_batched(table):
    """An axis that nothing carries."""
    p = jtu.tree_map(lambda x: x, _first(_batched_parameters()))
    p = p | jtu.tree_map(
        lambda x: x[0], {"y0": p["y0"], "closed_over": p["closed_over"]}
    )
    f = lambda p: jax.vmap(lambda s: s * _loss(p))(jnp.array([1.0, 2.0]))
    found = jit(jax.grad(_sum(f)))(p)
    true = jtu.tree_map(lambda x: 3 * x[0, 0], table)
    assert leaf_differences(found, true) < 1e-10


#
# Everything else that may be batched
#


@pytest.mark.parametrize("stepping", quick(CONTROLLERS, "constant", "PID"))
def test_batched_intervals(stepping):
    """`t0`, `t1`, `dt0` and `SaveAt(ts=...)` differ from element to element, and so do
    the directions."""
    intervals = jnp.array([interval for (interval,) in (x.values for x in INTERVALS)])
    solver = ReversibleYoshida4()
    p = parameters()

    def one(p, interval, adjoint):
        return loss(p, solver, stepping, save_times, tuple(interval), adjoint)

    @jit
    def grads(p):
        f = lambda p: jnp.sum(jax.vmap(lambda i: one(p, i, _ours))(intervals))
        each = lambda i: jax.grad(one)(p, i, _reference)
        true = lax.map(each, intervals)
        return jax.grad(f)(p), jtu.tree_map(lambda x: jnp.sum(x, 0), true)

    assert leaf_differences(*grads(p)) < 1e-10


def test_inactive_elements():
    """Elements that are done early must neither be walked on to where the vector field
    is not defined nor touch the gradient."""

    def one(y0, scale, t1, shared, adjoint):
        def vector_field(t, y, args):
            start, end, scale = args
            ends = jnp.sqrt((t - start + 1e-6) * (end + 1e-6 - t))
            return shared * scale * jnp.sqrt(y) + jnp.sin(20 * scale * t) * ends

        t0 = 0.2
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            ReversibleALF4(),
            t0,
            t1,
            0.3,
            y0,
            (t0, t1, scale),
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=jnp.array([0.2, 0.2]), steps=2),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
            max_steps=128,
            adjoint=adjoint,
        )
        ys = jnp.where(jnp.isfinite(solution.ys), solution.ys, 0)
        return jnp.sum(jnp.sin(ys)), solution.stats["num_accepted_steps"]

    y0 = jnp.array([[1e-3, 2.0], [0.5, 0.02], [1.0, 1.0], [3.0, 0.1]])
    scale = jnp.array([0.1, 3.0, 1.0, 0.5])
    # The third makes no step at all.
    t1 = jnp.array([1.0, 1.2, 0.2, 0.25])

    @jit
    def both(y0, scale, shared):
        def total(y0, scale, shared):
            f = lambda *x: one(*x, shared, _ours)
            losses, num_steps = jax.vmap(f)(y0, scale, t1)
            return jnp.sum(losses), num_steps

        def each(x):
            y0, scale, t1 = x
            f = lambda y0, scale, shared: one(y0, scale, t1, shared, _reference)[0]
            return jax.grad(f, (0, 1, 2))(y0, scale, shared)

        grads, num_steps = jax.grad(total, (0, 1, 2), has_aux=True)(y0, scale, shared)
        *true, true_shared = lax.map(each, (y0, scale, t1))
        return grads, (*true, jnp.sum(true_shared)), num_steps

    found, true, num_steps = both(y0, scale, jnp.array(0.7))
    assert len(set(num_steps.tolist())) == 4
    assert num_steps[2] == 0
    assert all(jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(found))
    assert leaf_differences(found, true) < 1e-10


def test_named_axis():
    """A vector field that communicates along a named axis."""
    weights = jr.normal(jr.PRNGKey(0), (3, 3))
    y0 = jr.normal(jr.PRNGKey(1), (4, 3))

    def one(y0, weights, adjoint):
        def vector_field(t, y, args):
            return jnp.tanh(args @ y + t) - lax.pmean(y, "batch")

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            ReversibleALF4(),
            0.0,
            1.0,
            0.13,
            y0,
            weights,
            saveat=diffrax.SaveAt(ts=jnp.array([0.3, 1.0])),
            adjoint=adjoint,
        )
        return jnp.sum(jnp.sin(solution.ys))

    def grads(adjoint):
        f = lambda y, w: jax.vmap(
            lambda y: one(y, w, adjoint), axis_name="batch", axis_size=4
        )(y)
        inside = jax.vmap(
            lambda y: jax.grad(one, (0, 1))(y, weights, adjoint), axis_name="batch"
        )
        outside = jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1))(y0, weights)
        return outside, inside(y0)

    found, true = jit(lambda: (grads(_ours), grads(diffrax.DirectAdjoint())))()
    assert leaf_differences(found, true) < 1e-10


#
# Forward mode, and forward over reverse
#


def test_jvp():
    p = parameters()
    tangent = normal_like(p, 3)

    @jit
    def jvp(p, tangent, scales):
        def one(adjoint, scale):
            f = lambda p: loss(
                p, ReversibleALF4(), pid, save_everything, (1.4, -0.3), adjoint
            )
            scaled = jtu.tree_map(lambda x: scale * x, p)
            return jax.jvp(f, (scaled,), (tangent,))

        found = jax.vmap(lambda s: one(_ours, s))(scales)
        return found, lax.map(lambda s: one(diffrax.ForwardMode(), s), scales)

    found, true = jvp(p, tangent, jnp.array([1.0, 0.6]))
    assert leaf_differences(found, true) < 1e-10


@pytest.mark.slow
def test_jacfwd():
    def ends(p, adjoint):
        solution = solve(p, ReversibleALF4(), pid, save_dense, (0.3, 1.9), adjoint)
        return solution.ys, solution.evaluate(0.77)

    @jit
    def jacobians(p):
        return [
            jax.jacfwd(lambda p: ends(p, adjoint))(p)
            for adjoint in (_ours, diffrax.ForwardMode())
        ]

    found, true = jacobians(parameters())
    finite = lambda tree: jtu.tree_map(jnp.nan_to_num, tree)
    assert tree_difference(finite(found), finite(true)) < 1e-10


@pytest.mark.slow
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


@pytest.mark.slow
def test_hessian_of_batch():
    p = _first(_batched_parameters())

    def f(p):
        one = lambda p: loss(
            p, ReversibleALF4(), step_to, save_times, (0.3, 1.9), _ours
        )
        return jnp.sum(_vmap(one, _inner)(p))

    direction = normal_like(p, 6)
    product = jit(lambda p, d: jax.jvp(jax.grad(f), (p,), (d,))[1])(p, direction)
    true = directional_difference(jit(jax.grad(f)), p, direction, 1e-4)
    assert tree_difference(product, true) < 1e-8
