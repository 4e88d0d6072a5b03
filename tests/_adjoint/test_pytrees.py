from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF2, ReversibleALF4

from ..helpers import (
    constant,
    jit,
    leaf_differences,
    loss,
    parameters,
    pid,
    quick,
    save_everything,
    SOLVERS,
    tree_difference,
    weigh,
)


_ours = ReversibleAdjoint()
_reference = diffrax.RecursiveCheckpointAdjoint()


def _solve(term, y0, args, adjoint, solver=ReversibleALF4(), dtype=None, **options):
    number = float if dtype is None else lambda x: jnp.array(x, dtype)
    ts = jnp.array([0.3, 1.0], jnp.float64 if dtype is None else dtype)
    options = {"saveat": diffrax.SaveAt(ts=ts, t1=True, steps=True)} | options
    return diffrax.diffeqsolve(
        term,
        solver,
        number(0.2),
        number(1.2),
        number(0.13),
        y0,
        args,
        max_steps=16,
        adjoint=adjoint,
        **options,
    )


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

    @eqx.filter_jit
    def grads(inputs, adjoint):
        def f(inputs):
            field, args, y0 = inputs
            term = diffrax.ODETerm(field)
            return weigh(_solve(term, y0, args, adjoint, dtype=y0["y"].dtype).ys)

        return eqx.filter_grad(f)(inputs)

    inputs = (field, args, y0)
    found, true = grads(inputs, _ours), grads(inputs, _reference)
    assert found[1]["key"] is None and found[1]["count"] is None
    assert jnp.any(true[1]["weights"] != 0)
    assert tree_difference(found, true) < 1e-10


@pytest.mark.parametrize(
    "y0",
    (
        pytest.param(0.7, id="float"),
        pytest.param(jnp.array(0.7), id="scalar"),
        pytest.param((jnp.array([0.7]), [jnp.ones((2, 1, 2))]), id="nested"),
    ),
)
def test_state(y0):
    def f(y0, a, adjoint):
        field = lambda t, y, args: jtu.tree_map(lambda y: jnp.sin(args * y + t), y)
        return weigh(_solve(diffrax.ODETerm(field), y0, a, adjoint).ys)

    grad = jax.grad(f, (0, 1))
    found, true = jit(lambda *x: (grad(*x, _ours), grad(*x, _reference)))(y0, 1.3)
    assert leaf_differences(found, true) < 1e-10


@pytest.mark.parametrize("solver", quick(SOLVERS, "ALF2"))
def test_terms_with_controls(solver):
    """The increments of a control, and what it depends on."""
    p = {
        "y0": jnp.array([0.3, -0.5]),
        "matrix": jr.normal(jr.PRNGKey(0), (2, 2)),
        "control": jr.normal(jr.PRNGKey(1), (4, 3)),
        "closed_over": jnp.array(0.6),
    }

    def f(p, adjoint):
        drift = lambda t, y, args: jnp.tanh(args @ y) * p["closed_over"] + jnp.cos(t)
        diffusion = lambda t, y, args: jnp.outer(jnp.sin(y), jnp.arange(1.0, 4.0))
        control = diffrax.LinearInterpolation(jnp.linspace(0, 1.5, 4), p["control"])
        term = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, control)
        )
        saveat = diffrax.SaveAt(ts=jnp.array([0.3, 1.0]), steps=2, dense=True)
        solution = _solve(term, p["y0"], p["matrix"], adjoint, solver, saveat=saveat)
        return weigh(solution.ys) + jnp.sum(solution.evaluate(0.9) ** 2)

    grad = jax.grad(f)
    found, true = jit(lambda p: (grad(p, _ours), grad(p, _reference)))(p)
    assert jnp.all(true["control"] != 0)
    assert leaf_differences(found, true) < 1e-10


@pytest.mark.parametrize(
    "dtype, adaptive",
    (
        (jnp.float32, True),
        (jnp.float64, False),
        pytest.param(jnp.float32, False, marks=pytest.mark.slow),
        pytest.param(jnp.float64, True, marks=pytest.mark.slow),
    ),
)
def test_dtype(dtype, adaptive):
    """State, solver state and gradient are of the dtype of the state and the times."""
    p = parameters(dtype=dtype)
    options = {}
    if adaptive:
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        options = dict(stepsize_controller=controller)

    def f(p, adjoint):
        field = lambda t, y, args: jtu.tree_map(lambda y: jnp.sin(args * y + t), y)
        saveat = diffrax.SaveAt(
            ts=jnp.array([0.3, 1.0], dtype), steps=2, solver_state=True, dense=True
        )
        solution = _solve(
            diffrax.ODETerm(field),
            p["y0"],
            p["args"]["rate"],
            adjoint,
            dtype=dtype,
            saveat=saveat,
            **options,
        )
        saved = (solution.ys, solution.ts, solution.solver_state)
        saved = (*saved, solution.evaluate(jnp.array(0.77, dtype)))
        assert all(x.dtype == dtype for x in jtu.tree_leaves(saved))
        return weigh(saved)

    grad = jax.grad(f)
    found, true = jit(lambda p: (grad(p, _ours), grad(p, _reference)))(p)
    assert all(x.dtype == dtype for x in jtu.tree_leaves(found))
    assert tree_difference(found, true) < (1e-5 if dtype == jnp.float32 else 1e-10)


def test_times_of_a_wider_dtype():
    """As diffrax, which promotes the state to the dtype of the times."""

    def f(y0, a, adjoint):
        field = lambda t, y, args: jnp.sin(args * y + t)
        return weigh(
            _solve(diffrax.ODETerm(field), y0, a, adjoint, dtype=jnp.float64).ys
        )

    grad = jax.grad(f, (0, 1))
    both = jit(lambda *x: (grad(*x, _ours), grad(*x, _reference)))
    found, true = both(jnp.array([0.4, 0.7], jnp.float32), jnp.array(1.3, jnp.float32))
    assert leaf_differences(found, true) < 1e-6


@pytest.mark.parametrize(
    "stepping", (constant, pytest.param(pid, marks=pytest.mark.slow))
)
def test_unperturbed_parameters(stepping):
    """The gradient with respect to some of the parameters only."""

    @jit
    def grads(p):
        def f(perturbed):
            q = p | perturbed
            interval = (0.3, 1.9)
            return loss(q, ReversibleALF2(), stepping, save_everything, interval, _ours)

        only = {key: jax.grad(f)({key: p[key]})[key] for key in ("closed_over", "fn")}
        some = jax.grad(f)({key: p[key] for key in ("y0", "args")})
        return jax.grad(f)(p), only | some

    all_grads, some_grads = grads(parameters())
    for key, grad in some_grads.items():
        assert leaf_differences(grad, all_grads[key]) < 1e-12


def test_complex():
    def f(p, adjoint):
        field = lambda t, y, args: 1j * args * y + 0.3 * jnp.conj(y) * y - 0.1 * t
        ys = _solve(diffrax.ODETerm(field), p["y0"], p["a"], adjoint).ys
        ys = jnp.where(jnp.isfinite(ys), ys, 0)
        return jnp.sum(jnp.abs(ys) ** 2 @ jnp.arange(1.0, 3.0))

    p = {"y0": jnp.array([0.3 + 0.1j, -0.2j]), "a": jnp.array(1.0 + 0.2j)}
    grad = jax.grad(f)
    with pytest.warns(UserWarning, match="Complex dtype"):
        found, true = jit(lambda p: (grad(p, _ours), grad(p, _reference)))(p)
    assert jnp.all(jnp.imag(true["a"]) != 0)
    assert leaf_differences(found, true) < 1e-10
