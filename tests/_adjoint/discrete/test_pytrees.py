"""States, terms, `args` and dtypes of every kind."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import Reversible, ReversibleAdjoint, ReversibleALF2

from ...helpers import (
    adjoint_of,
    directional_difference,
    jit,
    leaf_differences,
    normal_like,
    tree_difference,
    UNROLLED,
    weigh,
)
from ...reference import Problem, unrolled


_slow = pytest.mark.slow


def _solve(
    terms, p, adjoint, solver=ReversibleALF2(), dtype=jnp.float64, ts=(0.3, 1.0)
):
    """`terms(p)`, from `p["y0"]` with `p["args"]`."""
    t0, t1, dt0 = (jnp.array(x, dtype) for x in (0.2, 1.2, 0.13))
    rest = (t0, t1, dt0, p["y0"], p["args"])
    saveat = diffrax.SaveAt(ts=jnp.array(ts, dtype), t1=True)
    options = dict(saveat=saveat, max_steps=16)
    if adjoint is UNROLLED:
        return unrolled(Problem(terms, solver), p, *rest, **options)
    return diffrax.diffeqsolve(terms(p), solver, *rest, adjoint=adjoint, **options)


def _differences(terms, p, solver=ReversibleALF2(), **options):
    """Of the gradient and the unrolled one, which is also returned."""

    def f(p, adjoint):
        ys = _solve(terms, p, adjoint, solver, **options).ys
        if any(map(jnp.iscomplexobj, jtu.tree_leaves(ys))):
            return sum(jnp.sum(jnp.abs(y) ** 2) for y in jtu.tree_leaves(ys))
        return weigh(ys)

    found = jit(jax.grad(lambda p: f(p, adjoint_of(solver))))(p)
    true = jax.grad(f)(p, UNROLLED)
    return leaf_differences(found, true), true


class _Field(eqx.Module):
    """A vector field with leaves of every kind."""

    weights: jax.Array
    nothing: None
    count: int
    flag: bool
    index: jax.Array
    mask: jax.Array
    name: str
    activation: Callable
    scale: float
    static: str = eqx.field(static=True)

    def __call__(self, t, y, args):
        assert self.nothing is None and args["nothing"] is None
        assert self.name == "name" and self.static == "static" and args["name"] == "a"
        y, w = y["y"], args["weights"][args["index"]]
        out = args["activation"](self.weights @ y) * self.count * self.scale
        out = jnp.where(self.mask, out, w * y[self.index]) + jnp.sin(t) * args["count"]
        return {
            "nothing": None,
            "y": out - y if self.flag else y,
            "empty": jnp.zeros(0),
        }


def test_leaves_of_every_kind():
    field = _Field(
        jr.normal(jr.PRNGKey(0), (3, 3)),
        None,
        2,
        True,
        jnp.array([2, 0, 1]),
        jnp.array([True, False, True]),
        "name",
        jnp.tanh,
        0.7,
        "static",
    )
    args = {
        "weights": jr.normal(jr.PRNGKey(1), (5,)),
        "nothing": None,
        "count": 2,
        "index": jnp.array([4, 1, 1]),
        "flag": jnp.array(True),
        "name": "a",
        "activation": jnp.sin,
        "key": jr.key(0),
    }
    y0 = {"nothing": None, "y": jr.normal(jr.PRNGKey(2), (3,)), "empty": jnp.zeros(0)}

    p, rest = eqx.partition((field, args, y0), eqx.is_inexact_array)

    def f(p):
        field, args, y0 = eqx.combine(p, rest)
        solution = _solve(
            lambda _: diffrax.ODETerm(field),
            dict(y0=y0, args=args),
            ReversibleAdjoint(),
        )
        return weigh(solution.ys)

    value = eqx.filter_jit(f)
    grad = eqx.filter_jit(eqx.filter_grad(f))(p)
    assert jtu.tree_structure(grad) == jtu.tree_structure(p)
    direction = normal_like(p, 3)
    true = directional_difference(value, p, direction, 1e-3)
    found = sum(map(jnp.vdot, jtu.tree_leaves(grad), jtu.tree_leaves(direction)))
    assert abs(found - true) < 1e-8 * abs(true)


def _sin(p):
    del p

    def field(t, y, args):
        return jtu.tree_map(lambda y: jnp.sin(args * y + t), y)

    return diffrax.ODETerm(field)


@pytest.mark.parametrize(
    "y0",
    (
        pytest.param(jnp.array(0.7), id="scalar"),
        pytest.param((jnp.array([0.7]), [jnp.ones((2, 1, 2))]), id="nested"),
    ),
)
def test_state(y0):
    difference, _ = _differences(_sin, dict(y0=y0, args=jnp.array(1.3)))
    assert difference < 1e-10


def test_state_that_is_no_array():
    f = lambda y0, a: weigh(_solve(_sin, dict(y0=y0, args=a), ReversibleAdjoint()).ys)
    found = jit(jax.grad(f, (0, 1)))(0.7, 1.3)
    p = dict(y0=jnp.array(0.7), args=jnp.array(1.3))
    true = jax.grad(lambda p: weigh(_solve(_sin, p, UNROLLED).ys))(p)
    assert tree_difference(found, (true["y0"], true["args"])) < 1e-10


def test_terms_with_controls():
    """The increments of a control, and what it depends on."""
    p = {
        "y0": jnp.array([0.3, -0.5]),
        "args": jr.normal(jr.PRNGKey(0), (2, 2)),
        "control": jr.normal(jr.PRNGKey(1), (4, 3)),
        "closed_over": jnp.array(0.6),
    }

    def terms(p):
        drift = lambda t, y, args: jnp.tanh(args @ y) * p["closed_over"] + jnp.cos(t)
        diffusion = lambda t, y, args: jnp.outer(jnp.sin(y), jnp.arange(1.0, 4.0))
        control = diffrax.LinearInterpolation(jnp.linspace(0, 1.5, 4), p["control"])
        return diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, control)
        )

    difference, true = _differences(terms, p)
    assert jnp.all(true["control"] != 0)
    assert difference < 1e-10


def test_unperturbed_parameters():
    """The gradient with respect to some of the parameters only."""
    p = dict(y0=jnp.array([0.3, 0.9]), args=jnp.array(1.2), closed_over=jnp.array(0.4))

    def terms(p):
        field = lambda t, y, args: jnp.sin(args * y[::-1] + p["closed_over"] * t)
        return diffrax.ODETerm(field)

    def f(some):
        return weigh(_solve(terms, p | some, ReversibleAdjoint()).ys)

    @jit
    def grads():
        keys = (("y0",), ("args",), ("closed_over",), ("y0", "args"))
        return jax.grad(f)(p), [jax.grad(f)({k: p[k] for k in some}) for some in keys]

    everything, parts = grads()
    for part in parts:
        for key, grad in part.items():
            assert tree_difference(grad, everything[key]) < 1e-12


#
# Dtypes
#

_SOLVERS = {
    "ALF2": ReversibleALF2(),
    "coupled": Reversible(diffrax.Bosh3()),
    "Heun": diffrax.ReversibleHeun(),
    "Bosh3": diffrax.Bosh3(),
}
# Of the state, of what the vector field computes in, and of what it returns; and how
# different gradients may be.
_DTYPES = {
    "float32": ((jnp.float32,) * 3, 1e-5),
    "bfloat16": ((jnp.float32, jnp.bfloat16, jnp.float32), 1e-5),
    "float16": ((jnp.float32, jnp.float16, jnp.float16), 1e-5),
    "complex128": ((jnp.complex128,) * 3, 1e-12),
    "complex64": ((jnp.complex64,) * 3, 1e-5),
    # One unit in the last place of these is 8e-3 and 1e-3.
    "bfloat16 state": ((jnp.bfloat16,) * 3, 2e-2),
    "float16 state": ((jnp.float16,) * 3, 5e-3),
}
_quick = {
    ("ALF2", "float32"),
    ("ALF2", "bfloat16"),
    ("ALF2", "complex128"),
    ("Bosh3", "bfloat16 state"),
}


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax:UserWarning")
@pytest.mark.parametrize(
    "solver, dtypes, tolerance",
    [
        pytest.param(
            solver,
            *dtypes,
            id=f"{name}-{kind}",
            marks=() if (name, kind) in _quick else _slow,
        )
        for name, solver in _SOLVERS.items()
        for kind, dtypes in _DTYPES.items()
    ],
)
def test_dtypes(solver, dtypes, tolerance):
    state, inner, outer = dtypes
    real = jnp.finfo(state).dtype

    def terms(p):
        del p

        def vector_field(t, y, weights):
            y = jnp.tanh(weights.astype(inner) @ y.astype(inner))
            return (y * jnp.cos(t).astype(inner)).astype(outer)

        return diffrax.ODETerm(vector_field)

    y0 = jnp.array([0.5, 1.0, -0.3])
    weights = jr.normal(jr.PRNGKey(0), (3, 3))
    if jnp.issubdtype(state, jnp.complexfloating):
        y0, weights = y0.astype(complex), weights.astype(complex)
        y0, weights = y0 * (1 + 0.3j), weights + 0.2j * weights[::-1]
    weights = weights.astype(jnp.float32 if outer != state else state)
    p = dict(y0=y0.astype(state), args=weights)
    solution = jax.eval_shape(
        lambda: _solve(terms, p, adjoint_of(solver), solver, dtype=real)
    )
    assert solution.ys.dtype == state and solution.ts.dtype == real
    difference, true = _differences(terms, p, solver, dtype=real)
    assert difference < tolerance
    assert true["y0"].dtype == state


def test_times_of_a_wider_dtype():
    """As diffrax, which promotes the state to the dtype of the times."""
    p = dict(y0=jnp.array([0.4, 0.7], jnp.float32), args=jnp.array(1.3, jnp.float32))

    def terms(p):
        del p
        wide = lambda t, y, args: jnp.sin(args.astype(y.dtype) * y + t)
        return diffrax.ODETerm(wide)

    f = lambda p: weigh(_solve(terms, p, ReversibleAdjoint()).ys)
    wide = jtu.tree_map(lambda x: x.astype(jnp.float64), p)
    found = jit(jax.grad(f))(p)
    true = jax.grad(lambda p: weigh(_solve(terms, p, UNROLLED).ys))(wide)
    assert all(x.dtype == jnp.float32 for x in jtu.tree_leaves(found))
    narrow = jtu.tree_map(lambda x: x.astype(jnp.float32), true)
    assert leaf_differences(found, narrow) < 1e-6
