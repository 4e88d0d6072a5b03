"""`InterpolatedAdjoint` with every kind of state, solver, and argument."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import InterpolatedAdjoint, RecordedSteps

from ...helpers import (
    jit,
    leaf_differences,
    parameters,
    pid,
    solve,
    tree_difference,
    weigh,
)


_reference = diffrax.RecursiveCheckpointAdjoint()


def _pid(tol=1e-8):
    return diffrax.PIDController(rtol=tol, atol=tol)


def _solve(p, adjoint, **options):
    term = diffrax.ODETerm(lambda t, y, w: jnp.sin(w @ y + 2 * t))
    options = (
        dict(
            terms=term,
            solver=diffrax.Tsit5(),
            t0=0.0,
            t1=1.5,
            dt0=None,
            stepsize_controller=_pid(),
            saveat=diffrax.SaveAt(ts=jnp.array([0.4, 1.5])),
        )
        | options
    )
    return diffrax.diffeqsolve(y0=p["y0"], args=p["w"], adjoint=adjoint, **options)


def _parameters():
    return {"y0": jnp.array([0.5, -0.3]), "w": jr.normal(jr.PRNGKey(0), (2, 2))}


def _differences(p, *adjoints, **options):
    """Of the gradients by each of them and by the reference."""

    @eqx.filter_jit
    def grads(p):
        loss = lambda p, adjoint: weigh(_solve(p, adjoint, **options).ys)
        return [eqx.filter_grad(loss)(p, a) for a in (*adjoints, _reference)]

    *found, true = grads(p)
    assert all(bool(jnp.any(x != 0)) for x in jtu.tree_leaves(true))
    differences = [tree_difference(x, true) for x in found]
    print(differences)
    return differences


#
# Solvers
#


def test_implicit_solver():
    """Of two terms, in both passes; against nearly the exact solution."""

    def implicit(t, y, w):
        return -5 * (y - jnp.cos(w @ y))

    explicit = lambda t, y, w: jnp.sin(w @ y + 2 * t)
    terms = diffrax.MultiTerm(diffrax.ODETerm(explicit), diffrax.ODETerm(implicit))
    solves = (
        (diffrax.KenCarp3(), 1e-4, InterpolatedAdjoint(16)),
        (diffrax.Tsit5(), 1e-8, _reference),
    )

    def loss(p, solver, tol, adjoint):
        options = dict(terms=terms, solver=solver, stepsize_controller=_pid(tol))
        return weigh(_solve(p, adjoint, **options).ys)

    found, true = jit(lambda p: [jax.grad(loss)(p, *s) for s in solves])(_parameters())
    assert tree_difference(found, true) < 2e-3


@pytest.mark.slow
def test_own_solver_and_controller():
    """Those of the adjoint equation may be any: a coarse one shows in the gradient."""
    constant = diffrax.ConstantStepSize()
    options = dict(stepsize_controller=constant, max_steps=20)
    adjoints = (
        InterpolatedAdjoint(16, solver=diffrax.Euler(), dt0=0.1, **options),
        # The sign of `dt0` is not looked at.
        InterpolatedAdjoint(16, solver=diffrax.Dopri8(), dt0=-0.1, **options),
    )
    euler, dopri8 = _differences(_parameters(), *adjoints)
    assert dopri8 < 1e-6
    assert 1e-3 < euler < 0.3


@pytest.mark.slow
def test_controllers_of_the_solve():
    """Are taken for the adjoint equation, too, where that is possible; and times at which
    to step are those of the solve, also for `t1 < t0`."""
    ts = jnp.array([0.3, 0.9])
    controller = diffrax.ClipStepSizeController(_pid(), step_ts=ts)
    options = dict(stepsize_controller=RecordedSteps(controller, 256), t0=1.5, t1=0.0)
    options["saveat"] = diffrax.SaveAt(t1=True)
    adjoints = (
        InterpolatedAdjoint(16),
        InterpolatedAdjoint(16, stepsize_controller=controller),
    )
    assert max(_differences(_parameters(), *adjoints, **options)) < 1e-6


@pytest.mark.parametrize(
    "quadrature", ("nodes", pytest.param(None, marks=pytest.mark.slow))
)
def test_size_of_the_cotangent(quadrature):
    """The adjoint equation is linear: its tolerances are relative to the size of what is
    differentiated. A NaN stays one."""
    adjoint = InterpolatedAdjoint(10, quadrature=quadrature)
    loss = lambda p, scale: scale * weigh(_solve(p, adjoint).ys)
    grad = jit(jax.grad(loss))
    p, small = _parameters(), 2.0**-60
    scaled = jtu.tree_map(lambda x: small * x, grad(p, 1.0))
    assert tree_difference(grad(p, small), scaled) < 1e-14
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jtu.tree_leaves(grad(p, jnp.nan)))


#
# The solve
#


def test_solution():
    """That of any other adjoint, to the last bit, in the same structure."""
    saveat = diffrax.SaveAt(
        subs=[diffrax.SubSaveAt(t1=True), diffrax.SubSaveAt(t0=True, ts=[0.1, 0.2])],
        solver_state=True,
        controller_state=True,
        made_jump=True,
    )

    @jit
    def both(p):
        adjoints = (InterpolatedAdjoint(9), _reference)
        return tuple(_solve(p, a, saveat=saveat) for a in adjoints)

    assert eqx.tree_equal(*both(_parameters()))


@pytest.mark.parametrize(
    "saveat",
    (diffrax.SaveAt(t0=True), diffrax.SaveAt(solver_state=True)),
    ids=("t0", "nothing"),
)
def test_nothing_of_the_solve_is_saved(saveat):
    def loss(p, adjoint):
        return jnp.sum(p["y0"] ** 2) + weigh(_solve(p, adjoint, saveat=saveat).ys)

    p = _parameters()
    grads = jit(
        lambda p: [jax.grad(loss)(p, a) for a in (InterpolatedAdjoint(4), _reference)]
    )
    assert leaf_differences(*grads(p)) < 1e-14


#
# States and parameters
#


class _Field(eqx.Module):
    weights: jax.Array
    index: jax.Array
    count: int
    activation: object = jnp.tanh

    def __call__(self, t, y, args):
        out = self.activation(self.weights @ y["a"]) * self.count * args[0]
        return {"a": out[self.index] + args[1], "none": None, "empty": jnp.zeros(0)}


def test_leaves_of_every_kind():
    inputs = (
        _Field(jr.normal(jr.PRNGKey(1), (2, 2)), jnp.array([1, 0]), 2),
        {"a": jnp.array([0.2, 0.5]), "none": None, "empty": jnp.zeros(0)},
        [jnp.array(0.7), 1, None, "name", jnp.sin, jnp.array(True)],
    )

    @eqx.filter_jit
    def grads(inputs):
        def loss(inputs, adjoint):
            field, y0, args = inputs
            options = dict(terms=diffrax.ODETerm(field))
            return weigh(_solve({"y0": y0, "w": args}, adjoint, **options).ys)

        adjoints = (InterpolatedAdjoint(14), _reference)
        return [eqx.filter_grad(loss)(inputs, a) for a in adjoints]

    found, true = grads(inputs)
    assert tree_difference(found, true) < 1e-6


@pytest.mark.slow
def test_float32():
    p = jtu.tree_map(lambda x: x.astype(jnp.float32), _parameters())
    number = lambda x: jnp.array(x, jnp.float32)
    options = dict(
        t0=number(0.0),
        t1=number(1.5),
        saveat=diffrax.SaveAt(ts=number([0.4, 1.5])),
        stepsize_controller=_pid(1e-5),
    )
    assert max(_differences(p, InterpolatedAdjoint(12), **options)) < 1e-4


@pytest.mark.slow
def test_complex():
    p = jtu.tree_map(lambda x: lax.complex(x, 0.3 * x[::-1]), _parameters())

    def vector_field(t, y, w):
        return 1j * w @ y + 0.3 * jnp.conj(y) * y - 0.1 * t.astype(y.dtype)

    term = diffrax.ODETerm(vector_field)

    @jit
    def grads(p):
        def loss(p, adjoint):
            ys = _solve(p, adjoint, terms=term, dt0=0.1).ys
            return jnp.sum(jnp.abs(ys) ** 2 @ jnp.arange(1.0, 3.0))

        return [jax.grad(loss)(p, a) for a in (InterpolatedAdjoint(16), _reference)]

    with pytest.warns(UserWarning, match="Complex dtype"):
        found, true = grads(p)
    assert leaf_differences(found, true) < 1e-6


@pytest.mark.slow
def test_parameters_in_every_place():
    """The vector field, states and parameters of the other adjoints' tests."""

    def save(t0, t1, p):
        del p
        return diffrax.SaveAt(ts=jnp.stack([t0, 0.7 * t0 + 0.3 * t1, t1]))

    def stepping(t0, t1):
        return eqx.tree_at(lambda s: s.controller, pid(t0, t1), _pid())

    @jit
    def grads(p):
        def loss(p, adjoint):
            interval = jnp.array([1.4, -0.3])
            args = (diffrax.Tsit5(), stepping, save, interval, adjoint)
            return weigh(solve(p, *args, max_steps=512).ys)

        return [jax.grad(loss)(p, a) for a in (InterpolatedAdjoint(16), _reference)]

    found, true = grads(parameters())
    assert leaf_differences(found, true) < 1e-6
