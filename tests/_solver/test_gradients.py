"""Gradients of the solvers that are not in `helpers.SOLVERS`: those without an error
estimate, and those for pairs of terms."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import (
    EES25,
    EES27,
    Reversible,
    ReversibleAdjoint,
    StormerVerlet,
    SymplecticComposition,
)

from ..helpers import (
    constant,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    pairwise_or_product,
    parameters,
    pid,
    save_dense,
    save_end,
    save_everything,
    save_times,
    solution_loss,
    step_to,
    tree_difference,
)


# What differs from another solver by coefficients alone is for the slow tests.
_slow = pytest.mark.slow

ADAPTIVE = (
    pytest.param(Reversible(diffrax.Tsit5()), id="Reversible-Tsit5", marks=_slow),
    pytest.param(Reversible(diffrax.Heun()), id="Reversible-Heun"),
    pytest.param(Reversible(diffrax.Dopri8()), id="Reversible-Dopri8", marks=_slow),
    pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun"),
)

FIXED = (
    pytest.param(Reversible(diffrax.Euler(), 1.0), id="Reversible-Euler"),
    pytest.param(diffrax.LeapfrogMidpoint(), id="LeapfrogMidpoint"),
)

PAIRS = (
    pytest.param(diffrax.SemiImplicitEuler(), id="SemiImplicitEuler", marks=_slow),
    pytest.param(StormerVerlet(), id="StormerVerlet"),
    pytest.param(SymplecticComposition(order=4), id="SymplecticComposition4"),
)

_adaptive = (pytest.param(pid, id="PID"), pytest.param(step_to, id="StepTo"))
_saves = (
    pytest.param(save_end, id="end"),
    pytest.param(save_everything, id="everything"),
)
_fixed = (pytest.param(constant, id="constant"), pytest.param(step_to, id="StepTo"))


def _check(loss, *args):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(loss)(p, *args, adjoint)
            for adjoint in (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(parameters())
    assert abs(value - true_value) < 1e-12 * abs(true_value)
    assert tree_difference(grad, true_grad) < 1e-10
    assert leaf_differences(grad, true_grad) < 1e-10
    matters = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(true_grad)]
    assert sum(matters) >= len(matters) - 1


@pytest.mark.parametrize(
    "solver, stepping, saves, interval",
    pairwise_or_product(ADAPTIVE, _adaptive, _saves, INTERVALS),
)
def test_with_error_estimate(solver, stepping, saves, interval):
    _check(loss, solver, stepping, saves, interval)


@pytest.mark.parametrize(
    "solver, stepping, saves, interval",
    pairwise_or_product(FIXED, _fixed, _saves, INTERVALS),
)
def test_without_error_estimate(solver, stepping, saves, interval):
    _check(loss, solver, stepping, saves, interval)


class _Pair(eqx.Module):
    """A term of one half of the state, with parameters wherever they may be."""

    matrix: jax.Array
    drive: jax.Array

    def __call__(self, t, y, args):
        drive = args["rate"] * jnp.cos(self.drive * t)
        return jnp.tanh(self.matrix @ y + args["shift"][:2]) + drive * jnp.sin(y)


def _pair_loss(p, solver, stepping, saves, interval, adjoint):
    t0, t1 = interval
    stepping = stepping(t0, t1)
    closed_over = p["closed_over"]
    f = _Pair(p["term"][:2, :2], closed_over)
    g = _Pair(p["term"][2:4, :2], p["term"][4, 4])
    weights = p["term"][2, 2:4]
    terms = (
        diffrax.ODETerm(f),
        diffrax.ODETerm(lambda t, q, args: weights * g(t, q, args)),
    )
    y0 = (p["y0"]["a"], p["y0"]["b"][:2])
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        t0,
        t1,
        stepping.dt0,
        y0,
        p["args"],
        saveat=saves(t0, t1, p),
        stepsize_controller=stepping.controller,
        adjoint=adjoint,
    )
    return solution_loss(solution)


_pair_saves = (
    pytest.param(save_times, id="times"),
    pytest.param(save_dense, id="dense"),
)


@pytest.mark.parametrize(
    "solver, stepping, saves, interval",
    pairwise_or_product(PAIRS, _fixed, _pair_saves, INTERVALS),
)
def test_pairs_of_terms(solver, stepping, saves, interval):
    _check(_pair_loss, solver, stepping, saves, interval)


@pytest.mark.parametrize("solver, order", [(EES25(), 5), (EES27(), 7)])
def test_near_reversible(solver, order):
    """The gradient is off by the error of the reversal, and that falls at its order."""

    def f(p, dt0, adjoint):
        y0 = jnp.concatenate([p["y0"]["a"], p["y0"]["b"]])
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, a: jnp.tanh(p["term"] @ y + a) * jnp.cos(t)),
            solver,
            0.0,
            2.0,
            dt0,
            y0,
            p["args"]["shift"],
            max_steps=64,
            saveat=diffrax.SaveAt(ts=jnp.array([0.7, 2.0])),
            adjoint=adjoint,
        )
        return jnp.sum(jnp.sin(solution.ys))

    @jit
    def grads(p, dt0):
        return [
            jax.grad(f)(p, dt0, adjoint)
            for adjoint in (
                ReversibleAdjoint(rtol=1e-2),
                diffrax.RecursiveCheckpointAdjoint(),
            )
        ]

    steps = jnp.array([6.0, 8.0, 12.0])
    errors = [tree_difference(*grads(parameters(), 2.0 / n)) for n in steps]
    print(f"{type(solver).__name__}: gradient differences {errors}")
    found = -jnp.polyfit(jnp.log(steps), jnp.log(jnp.array(errors)), 1)[0]
    assert errors[0] < 1e-3
    assert found > order - 0.5
