"""The differentiation rule by itself, with a sweep that knows nothing of solvers."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible._autodiff.rule import with_reverse_sweep
from diffrax_reversible._autodiff.sweep import AbstractSweep, Inputs


_max_steps, _h = 4, 0.3
_c = jnp.array([0.1, -0.2])


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def _step(y, p):
    return y + p["h"] * jnp.tanh(p["W"] @ y + _c.astype(y.dtype))


class _Toy(AbstractSweep):
    """`n` steps; returns also how many those were."""

    refusal = "closed over"
    refusal_twice = "twice"

    def __init__(self, step=_step, doubt=lambda y: jnp.zeros((), y.real.dtype)):
        self.step_of = step
        self.doubt = doubt
        self.traced = []

    def _run(self, inputs, memory):
        n = inputs.rest

        def body(carry):
            i, y, memory = carry
            kept = None if memory is None else memory.at[i].set(y)
            return i + 1, self.step_of(y, inputs.parameters), kept

        init = (jnp.zeros_like(n), inputs.state, memory)
        i, y, memory = lax.while_loop(lambda carry: carry[0] < n, body, init)
        return {"y": y, "count": i}, memory

    def evaluate(self, inputs):
        self.traced.append("evaluate")
        return self._run(inputs, None)[0]

    def evaluate_with_memory(self, inputs, perturbed):
        del perturbed
        self.traced.append("memory")
        y = inputs.state
        return self._run(inputs, jnp.zeros((_max_steps, *y.shape), y.dtype))

    def start(self, residuals, cotangents, batch):
        del batch
        assert cotangents["count"] is None
        return residuals.outputs["count"], cotangents["y"]

    def length(self, carry):
        return carry[0]

    def step(self, residuals, cotangents, carry, total, batch):
        i, cotangent = carry
        active = i > 0
        y0 = residuals.memory[jnp.maximum(i - 1, 0)]

        def fn(point, p):
            y, i = point
            return self.step_of(y, p), i + 1

        masked = jnp.where(active, cotangent, jnp.zeros_like(cotangent))
        (_, i1), (new, none), [total1] = batch.select(lambda p: [p]).vjp(
            lambda point, p: fn(point, *p),
            (y0, i),
            [residuals.inputs.parameters],
            (masked, None),
            [total],
        )
        assert none is None and i1.dtype == i.dtype
        # What the step does not depend on is left alone.
        assert total1["unused"] is total["unused"]
        return (jnp.maximum(i - 1, 0), jnp.where(active, new, cotangent)), total1

    def finish(self, residuals, cotangents, carry):
        return carry[1], self.doubt(residuals.outputs["y"])


def _ours(y, p, n):
    inputs = Inputs(y, p, n)
    return with_reverse_sweep(_Toy(), inputs)["y"]


def _reference(y, p, n):
    for i in range(_max_steps):
        y = jnp.where(i < n, _step(y, p), y)
    return y


def _data(dtype=jnp.float64, batch=()):
    keys = jr.split(jr.PRNGKey(0), 2)
    y = jr.normal(keys[0], (*batch, 2), dtype)
    p = {"W": jr.normal(keys[1], (2, 2), dtype), "h": jnp.array(_h, dtype)}
    return y, p | {"unused": jnp.ones(3, dtype)}


def _difference(x, y):
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    both = list(zip(jtu.tree_leaves(x), jtu.tree_leaves(y)))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in both)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in both)


def _check(transform, *args):
    f = lambda run: jax.jit(lambda *args: transform(run)(*args))(*args)
    assert _difference(f(_ours), f(_reference)) < 1e-12


def _loss(run, n=3):
    return lambda y, p: jnp.sum(jnp.sin(run(y, p, jnp.array(n))))


def _sum_of_vmap(run):
    """Elements with different numbers of steps, and with shared parameters."""
    ns = jnp.array([3, 0, 4])

    def f(ys, p):
        return jnp.sum(jax.vmap(lambda y, n: jnp.sum(jnp.sin(run(y, p, n))))(ys, ns))

    return f


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64, jnp.complex128))
def test_grad(dtype):
    def transform(run):
        return jax.grad(lambda y, p: jnp.sum(jnp.abs(run(y, p, jnp.array(3)))), (0, 1))

    y, p = _data(dtype)
    f = lambda run: jax.jit(lambda *args: transform(run)(*args))(y, p)
    assert _difference(f(_ours), f(_reference)) < (
        1e-6 if dtype == jnp.float32 else 1e-12
    )


def test_not_compiled():
    args = _data()
    find = lambda run: jax.grad(_loss(run), (0, 1))(*args)
    assert _difference(find(_ours), find(_reference)) < 1e-12


def test_grad_of_vmap():
    _check(lambda run: jax.grad(_sum_of_vmap(run), (0, 1)), *_data(batch=(3,)))


def test_vmap_of_grad():
    def transform(run):
        return jax.vmap(jax.grad(_loss(run), (0, 1)), in_axes=(0, None))

    _check(transform, *_data(batch=(3,)))


@pytest.mark.parametrize("inside", (True, False))
def test_nested_vmaps(inside):
    """`W` is shared along one axis only, `h` along both; the state carries both."""
    y, p = _data(batch=(3, 2))
    p = p | {"W": jnp.stack([p["W"], -p["W"]])}
    axes = {"W": 0, "h": None, "unused": None}
    n = jnp.array([[3, 1], [0, 4], [2, 2]])

    def transform(run):
        one = lambda y, p, n: jnp.sum(jnp.sin(run(y, p, n)))
        if inside:
            f = jax.vmap(jax.vmap(one, (0, axes, 0)), (0, None, 0))
        else:
            f = jax.vmap(jax.vmap(one, (0, None, 0)), (1, axes, 1))
        return jax.grad(lambda y, p: jnp.sum(f(y, p, n)), (0, 1))

    _check(transform, y, p)


def test_vmap_of_grad_of_vmap():
    y, p = _data(batch=(2, 3))
    p = p | {"W": jnp.stack([p["W"], -p["W"]])}
    axes = {"W": 0, "h": None, "unused": None}

    def transform(run):
        return jax.vmap(jax.grad(_sum_of_vmap(run), (0, 1)), in_axes=(0, axes))

    _check(transform, y, p)


def test_vmap_of_what_is_not_batched():
    def transform(run):
        f = lambda y, p: jax.vmap(lambda s: s * _loss(run)(y, p))(jnp.ones(3))
        return jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1))

    _check(transform, *_data())


def _tangent(args):
    return jtu.tree_map(jnp.cos, args)


def test_jvp():
    args = _data(batch=(3,))
    _check(lambda run: lambda *x: jax.jvp(_sum_of_vmap(run), x, _tangent(x)), *args)


def test_jacfwd():
    _check(
        lambda run: jax.jacfwd(lambda y, p: run(y, p, jnp.array(3)), (0, 1)), *_data()
    )


def test_jacfwd_of_jacfwd():
    _check(lambda run: jax.jacfwd(jax.jacfwd(_loss(run), (0, 1)), (0, 1)), *_data())


def test_jvp_of_jvp_of_jvp():
    def derivative(f):
        return lambda *x: jax.jvp(f, x, _tangent(x))[1]

    third = lambda run: derivative(derivative(derivative(_loss(run))))
    _check(third, *_data())


def test_jacfwd_of_grad():
    _check(lambda run: jax.jacfwd(jax.grad(_loss(run), (0, 1)), (0, 1)), *_data())


def test_jvp_of_grad_of_vmap():
    def transform(run):
        f = jax.grad(_sum_of_vmap(run), (0, 1))
        return lambda *x: jax.jvp(f, x, _tangent(x))

    _check(transform, *_data(batch=(3,)))


def test_grad_of_jvp_in_direction():
    """The derivative is linear in the direction, and so transposed like any other."""

    def transform(run):
        f = lambda *x: jax.vmap(run, (0, None, None))(*x, jnp.array(3))
        return lambda *x: jax.grad(lambda v: jnp.sum(jnp.sin(jax.jvp(f, x, v)[1])))(
            _tangent(x)
        )

    _check(transform, *_data(batch=(3,)))


def test_linearize_and_transpose():
    def transform(run):
        def f(*x):
            value, derivative = jax.linearize(_loss(run), *x)
            transposed = jax.linear_transpose(derivative, *x)
            return derivative(*_tangent(x)), transposed(jnp.ones_like(value))

        return f

    _check(transform, *_data())


def test_checkpoint_scan_cond():
    def transform(run):
        def total(y, p):
            def add(y, n):
                y = lax.cond(y[0] < 9, lambda: run(y, p, n), lambda: y)
                return y, None

            y, _ = lax.scan(jax.checkpoint(add), y, jnp.array([2, 0, 4]))
            return jnp.sum(y)

        return jax.grad(total, (0, 1))

    _check(transform, *_data())


#
# Refused
#


def test_twice_refused():
    y, p = _data()
    derivative = lambda y: jax.jvp(lambda y: _loss(_ours)(y, p), (y,), (y,))[1]
    gradient = lambda y: jnp.sum(jax.grad(_loss(_ours))(y, p))
    for f in (derivative, gradient, jax.jit(derivative)):
        with pytest.raises(RuntimeError, match="twice"):
            jax.eval_shape(jax.grad(f), y)


def test_closed_over():
    y, p = _data()

    def f(c):
        toy = _Toy(lambda y, p: _step(y, p) + c)
        return with_reverse_sweep(toy, Inputs(y, p, jnp.array(2)))["y"]

    cs = jnp.arange(3.0)
    assert _difference(jax.vmap(f)(cs), jnp.stack([f(c) for c in cs])) < 1e-12
    with pytest.raises(RuntimeError, match="closed over"):
        jax.eval_shape(jax.jacfwd(f), cs[0])
    # Traced anew with memory, when the first trace is over.
    g = jax.jit(
        lambda y, c: with_reverse_sweep(
            _Toy(lambda y, p: _step(y, p) + lax.stop_gradient(c)),
            Inputs(y, p, jnp.array(2)),
        )["y"]
    )
    found = jax.jit(lambda c: jax.jvp(lambda y: g(y, c), (y,), (y,)))(cs[1])
    h = lambda y: _step(_step(y, p) + cs[1], p) + cs[1]
    assert _difference(found, jax.jvp(h, (y,), (y,))) < 1e-12


def test_ordered_effects_refused():
    def step(y, p):
        jax.debug.print("{}", y, ordered=True)
        return _step(y, p)

    y, p = _data()
    run = lambda: with_reverse_sweep(_Toy(step), Inputs(y, p, jnp.array(2)))
    with pytest.raises(
        NotImplementedError, match="ordered.*RecursiveCheckpointAdjoint"
    ):
        jax.eval_shape(run)


def test_ordered_effects_of_derivatives():
    """Of the cotangents of a batch with shared parameters: refused."""
    toy = _Toy(lambda y, p: eqx.debug.backward_nan(_step(y, p), terminate=False))
    f = lambda y, p: jnp.sum(with_reverse_sweep(toy, Inputs(y, p, jnp.array(2)))["y"])
    total = lambda ys, p: jnp.sum(jax.vmap(f, (0, None))(ys, p))
    ys, p = _data(batch=(2,))
    jax.jit(jax.grad(f, 1)).lower(ys[0], p)
    with pytest.raises(NotImplementedError, match="backward_nan"):
        jax.jit(jax.grad(total, 1)).lower(ys, p)


#
# What else it does
#


def test_unordered_effects():
    seen = []

    def step(y, p):
        jax.debug.callback(lambda y: seen.append(y), y)
        return _step(y, p)

    y, p = _data(batch=(2,))

    def f(y, p):
        run = lambda y: with_reverse_sweep(_Toy(step), Inputs(y, p, jnp.array(2)))["y"]
        return jnp.sum(jax.vmap(run)(y))

    jax.block_until_ready(jax.jit(jax.grad(f, 1))(y, p))
    jax.effects_barrier()
    assert len(seen) > 4


def test_memory_only_where_differentiated():
    y, p = _data()
    toy = _Toy()
    f = lambda y: with_reverse_sweep(toy, Inputs(y, p, jnp.array(2)))["y"]
    jax.eval_shape(f, y)
    assert toy.traced == ["evaluate"]
    toy.traced.clear()
    jax.jit(lambda y: jax.vjp(f, y)[1](y)).lower(y)
    assert toy.traced == ["evaluate", "memory"]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.complex64))
def test_doubt(dtype):
    """NaN wherever an element that is not to be trusted contributes."""
    toy = _Toy(doubt=lambda y: jnp.where(jnp.abs(y[0]) > 10, jnp.nan, 0.0))
    ys, p = _data(dtype, batch=(3,))
    ys = ys.at[1].set(20)

    def one(y, p):
        y = with_reverse_sweep(toy, Inputs(y, p, jnp.array(2)))["y"]
        return jnp.sum(jnp.abs(y))

    grads = jax.vmap(jax.grad(one, (0, 1)), (0, None))(ys, p)
    for x in jtu.tree_leaves(grads):
        assert x.dtype == dtype
        assert [bool(jnp.all(jnp.isfinite(x[i]))) for i in range(3)] == [
            True,
            False,
            True,
        ]
    total = lambda ys, p: jnp.sum(jax.vmap(one, (0, None))(ys, p))
    shared = jax.grad(total, 1)(ys, p)
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jtu.tree_leaves(shared))


def test_split():
    tree = ({"a": jnp.ones(2), "b": 3, "f": jnp.sin}, [jnp.arange(2), 1.5])
    inputs, static = Inputs.split(*tree, (jnp.ones(()), None))
    assert all(eqx.is_array(x) for x in jtu.tree_leaves(inputs))
    assert eqx.tree_equal(inputs.join(static), (*tree, (jnp.ones(()), None)))
