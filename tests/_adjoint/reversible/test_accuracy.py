"""No gradient is wrong without a word: the check of the reversal, and checkpoints."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4
from diffrax_reversible._adjoint.discrete.checkpoints import Checkpoints

from ...helpers import jit, tree_difference
from ...measure import temp_memory


_float32 = lambda x: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x)


def _van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


_mlp = eqx.nn.MLP(8, 8, 16, 1, activation=jnp.tanh, key=jr.PRNGKey(0))
_weights, _rest = eqx.partition(_mlp, eqx.is_inexact_array)


def _contracting(t, y, weights):
    return eqx.combine(weights, _rest)(y) - 1.5 * y + jnp.cos(t)


# So long that float32 loses the way back, and not yet the solution.
_problem = (_contracting, jnp.linspace(-1, 1, 8), _weights, 8.0, 0.05)


def _loss(y0, args, vector_field, t1, dt0, adjoint, throw=True):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        ReversibleALF4(restart=None),
        *_float32((0.0, t1, dt0)),
        y0,
        args,
        saveat=diffrax.SaveAt(ts=_float32(jnp.linspace(1.0, t1, 5))),
        adjoint=adjoint,
        max_steps=4096,
        throw=throw,
    )
    return jnp.sum(solution.ys**2)


def _grad(problem, adjoint, throw=True):
    vector_field, y0, args, *options = problem
    f = lambda *x: _loss(*x, vector_field, *options, adjoint, throw)
    return jit(jax.grad(f, (0, 1)))(*_float32((y0, args)))


def test_contraction():
    true_grad = _grad(_problem, diffrax.RecursiveCheckpointAdjoint())
    grad = _grad(_problem, ReversibleAdjoint(checkpoints=64))
    difference = tree_difference(grad, true_grad)
    print(f"with 64 checkpoints: {difference:.1e}")
    assert difference < 1e-3
    with pytest.raises(Exception, match="has lost the solution") as error:
        jax.block_until_ready(_grad(_problem, ReversibleAdjoint()))
    for way_out in ("checkpoints=", "float64", "Tsit5(), adjoint=SymplecticAdjoint()"):
        assert way_out in str(error.value)


def test_nan():
    """By choice, and with `throw=False`."""
    for adjoint, throw in (
        (ReversibleAdjoint(on_failure="nan"), True),
        (ReversibleAdjoint(), False),
    ):
        grads = jax.tree.leaves(_grad(_problem, adjoint, throw))
        assert all(bool(jnp.all(jnp.isnan(x))) for x in grads)


def test_warning():
    with pytest.warns(UserWarning, match="has lost the solution"):
        grads = _grad(_problem, ReversibleAdjoint(on_failure="warn"))
        jax.block_until_ready(grads)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("outside", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_batch(outside):
    """The element that failed is named; whatever the order of `vmap` and `grad`."""
    vector_field, y0, args, _, dt0 = _problem

    def loss(y0, args, t1):
        adjoint = ReversibleAdjoint()
        return _loss(y0, args, vector_field, t1, dt0, adjoint)

    # The third element contracts for long.
    y0, t1s = _float32((jnp.stack(3 * [y0]), jnp.array([1.0, 2.0, 8.0])))
    axes = (0, None, 0)
    if outside:
        grad = jax.vmap(jax.grad(loss, (0, 1)), axes)
    else:
        grad = jax.grad(lambda *x: jnp.sum(jax.vmap(loss, axes)(*x)), (0, 1))
    with pytest.raises(Exception, match=r"element \(2,\) of the batch"):
        jax.block_until_ready(jit(grad)(y0, _float32(args), t1s))


@pytest.mark.parametrize("slots", (1, 4, 7))
def test_checkpoints_are_spread_evenly(slots):
    def keep(checkpoints, number):
        new = checkpoints.keep(number, jnp.asarray(number, float), number != 11)
        return new, None

    for steps in (1, slots, 5 * slots + 2, 100):
        start = Checkpoints.empty(slots, jnp.array(0.0))
        kept, _ = jax.lax.scan(keep, start, jnp.arange(1, steps + 1))
        numbers = [n for n in kept.numbers.tolist() if n > 0]
        assert len(set(numbers)) == len(numbers)
        stride = int(kept.stride)
        assert set(range(stride, steps + 1, stride)) - {11} <= set(numbers)
        # As finely as there is room for.
        assert kept.stride <= max(1, 2 * (steps + 1) / (slots + 1))
        for number in range(steps + 1):
            found, state = kept.find(number)
            assert bool(found) == (number in numbers)
            assert not found or state == number


def test_checkpoints_are_what_memory_grows_by():
    def temp_bytes(slots, steps):
        y0 = jnp.ones(1000)
        adjoint = ReversibleAdjoint(checkpoints=slots)

        def loss(y0):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -jnp.sin(y)),
                ReversibleALF4(),
                0.0,
                1.0,
                1 / steps,
                y0,
                adjoint=adjoint,
                max_steps=steps,
            )
            return jnp.sum(solution.ys**2)

        return temp_memory(jax.grad(loss), y0)

    states = lambda slots: slots * 2 * 1000 * 8
    small, large, long = temp_bytes(8, 100), temp_bytes(64, 100), temp_bytes(64, 10000)
    print(f"temp memory: {small}, {large}, {long} bytes")
    assert long == large
    assert large - small < 1.3 * (states(64) - states(8)) + 1000


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(checkpoints=0), "checkpoints="),
        (dict(reversal_rtol=0.0), "reversal_rtol="),
        (dict(on_failure="ignore"), "on_failure"),
    ),
)
def test_arguments(options, message):
    # With types checked at run time `Literal` is refused before.
    with pytest.raises(Exception, match=message):
        ReversibleAdjoint(**options)


def _friction(t, y, a):
    return jnp.stack([y[1], -jnp.sin(y[0]) - 2 * a * y[1]])


def _driven_network(t, y, a):
    w0, w1 = 0.4 * jr.normal(jr.PRNGKey(0), (2, 8, 8)).astype(y.dtype)
    return -a * y + jnp.tanh(w0 @ jnp.tanh(w1 @ y) + 0.1 * t)


def _half_van_der_pol(t, y, a):
    return _van_der_pol(t, y, 2 * a)


@pytest.mark.parametrize("restart", (None, pytest.param(0.45, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "dtype", (jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow))
)
@pytest.mark.parametrize(
    "vector_field, y0",
    (
        pytest.param(
            _friction, jnp.array([1.0, 0.5]), id="friction", marks=pytest.mark.slow
        ),
        pytest.param(
            _driven_network,
            jnp.linspace(-1, 1, 8),
            id="network",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _half_van_der_pol, jnp.array([1.0, 0.5]), id="vdP", marks=pytest.mark.slow
        ),
    ),
)
def test_default_rtol(vector_field, y0, dtype, restart):
    """From harmless to hopeless: the gradient has two digits, or is refused."""

    def loss(y0, a, t1, adjoint):
        t0 = jnp.zeros((), t1.dtype)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            ReversibleALF4(restart=restart),
            t0,
            t1,
            t1 / 200,
            y0,
            a,
            adjoint=adjoint,
            max_steps=202,
            throw=False,
        )
        return jnp.sum(solution.ys**2)

    a, t1 = jnp.meshgrid(
        jnp.array([0.25, 0.5, 1.0]), jnp.array([2.0, 4, 6, 8, 12, 16, 24])
    )

    @jit
    def grads(y0, a, t1):
        f = lambda a, t1: jax.grad(loss, (0, 1))(y0, a, t1, ReversibleAdjoint())
        return jax.vmap(f)(a, t1)

    @jit
    def true_grads(y0, a, t1):
        f = lambda a, t1: jax.grad(loss, (0, 1))(y0, a, t1, diffrax.DirectAdjoint())
        return jax.vmap(f)(a, t1)

    x = (y0, jnp.ravel(a), jnp.ravel(t1))
    true = jnp.concatenate([t.reshape(21, -1) for t in true_grads(*x)], axis=1)
    found = grads(*jax.tree.map(lambda x: x.astype(dtype), x))
    found = jnp.concatenate([g.reshape(21, -1) for g in found], axis=1)
    refused = jnp.any(jnp.isnan(found), axis=1)
    found = found.astype(true.dtype)
    difference = jnp.linalg.norm(found - true, axis=1)
    difference = difference / jnp.linalg.norm(true, axis=1)
    accepted = jnp.max(jnp.where(refused, 0, difference))
    print(f"{jnp.sum(~refused)} of 21 accepted, off by at most {accepted:.1e}")
    assert 5 < jnp.sum(~refused)
    assert accepted < 1e-2
