"""Gradients of `ReversibleAdjoint` and `SymplecticAdjoint` are exact, leaf by leaf.

What is saved is a matter of the reverse sweep and of how a kind of solver is reversed, not
of its coefficients: everything there is to save is saved once for each kind, and the other
solvers are tested with less. `-m slow` runs the product. Each case is one program for both
directions of time.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4, SymplecticAdjoint

from ..._reversal.third_party import OnlyBackwardStep
from ...helpers import (
    check,
    check_both_directions,
    clip,
    constant,
    CONTROLLERS,
    directional_difference,
    FIXED,
    jit,
    loss,
    normal_like,
    PAIRS,
    parameters,
    pid,
    product,
    RUNGE_KUTTA,
    save_dense,
    save_end,
    save_everything,
    save_times,
    SAVES,
    SOLVERS,
    step_to,
)


_SOLVERS = (
    *SOLVERS,
    pytest.param(OnlyBackwardStep(), id="backward_step"),
)
_DEFAULT = (
    # Each kind of reversal.
    ("ALF4", pid, save_everything),
    ("ReversibleHeun", step_to, save_everything),
    ("LeapfrogMidpoint", constant, save_everything),
    ("backward_step", constant, save_everything),
    # Updates of other kinds.
    ("MALI", constant, save_times),
    ("ALF4 restarting", pid, save_end),
    ("Heun coupled", pid, save_times),
    ("Euler coupled", constant, save_end),
)


def _cases(solvers, default, *axes):
    """The product, of which all but the `default` ones are slow."""

    def case(param):
        name = param.id.rsplit("-", len(axes))[0]
        slow = () if (name, *param.values[1:]) in default else (pytest.mark.slow,)
        return pytest.param(*param.values, id=param.id, marks=slow)

    unmarked = [pytest.param(*p.values, id=p.id) for p in solvers]
    return [case(param) for param in product(unmarked, *axes)]


@pytest.mark.parametrize(
    "solver, stepping, saves",
    [
        *_cases(_SOLVERS, _DEFAULT, CONTROLLERS, SAVES),
        *_cases(FIXED, _DEFAULT, CONTROLLERS[:2], SAVES),
    ],
)
def test_reversible(solver, stepping, saves):
    check_both_directions(solver, stepping, saves, ReversibleAdjoint())


_ADJOINTS = (
    pytest.param(SymplecticAdjoint(), id="plain"),
    pytest.param(SymplecticAdjoint(keep="stages"), id="stages"),
    pytest.param(SymplecticAdjoint(checkpoints=3), id="checkpoints"),
    pytest.param(SymplecticAdjoint(checkpoints=2, keep="stages"), id="both"),
    pytest.param(SymplecticAdjoint(keep="residuals"), id="residuals"),
    pytest.param(SymplecticAdjoint(checkpoints=2, keep="residuals"), id="thinned"),
)
_plain, _stages, _checkpoints, _both, _residuals, _thinned = (
    p.values[0] for p in _ADJOINTS
)
_DEFAULT_SYMPLECTIC = (
    ("Tsit5", pid, save_everything, _plain),
    ("Tsit5", constant, save_end, _stages),
    ("Tsit5", clip, save_times, _checkpoints),
    ("Tsit5", step_to, save_end, _both),
    ("Tsit5", pid, save_times, _residuals),
    ("Tsit5", clip, save_everything, _thinned),
    ("Euler", constant, save_times, _checkpoints),
)


@pytest.mark.parametrize(
    "solver, stepping, saves, ours",
    [
        param
        for i, param in enumerate(
            _cases(
                (*RUNGE_KUTTA, pytest.param(diffrax.Euler(), id="Euler")),
                _DEFAULT_SYMPLECTIC,
                CONTROLLERS,
                SAVES,
                _ADJOINTS,
            )
        )
        # Each of the slow ones with one of the ways to keep states.
        if not param.marks or (i + i // 4 + i // 16) % 4 == 0
    ],
)
def test_symplectic(solver, stepping, saves, ours):
    if isinstance(solver, diffrax.Euler) and stepping in (pid, clip):
        stepping = constant if stepping is pid else step_to
    # Adaptive steps amplify how they are rounded.
    tolerance = 1e-10 if stepping in (pid, clip) else 1e-12
    check_both_directions(solver, stepping, saves, ours, tolerance=tolerance)


class _Pair(eqx.Module):
    """A term of one half of the state, with parameters wherever they may be."""

    matrix: jax.Array
    drive: jax.Array

    def __call__(self, t, y, args):
        drive = args["rate"] * jnp.cos(self.drive * t)
        return jnp.tanh(self.matrix @ y + args["shift"][:2]) + drive * jnp.sin(y)


def _pair(p):
    matrices, weights = p["term"], p["term"][2, 2:4]
    f = _Pair(matrices[:2, :2], p["closed_over"])
    g = _Pair(matrices[2:4, :2], matrices[4, 4])
    second = diffrax.ODETerm(lambda t, q, args: weights * g(t, q, args))
    return diffrax.ODETerm(f), second


@pytest.mark.parametrize(
    "solver, stepping, saves",
    _cases(
        PAIRS,
        (("StormerVerlet", constant, save_dense),),
        CONTROLLERS[:2],
        SAVES[:3],
    ),
)
def test_pairs_of_terms(solver, stepping, saves):
    p = parameters()
    p = p | {"y0": (p["y0"]["a"], p["y0"]["b"][:2])}
    check_both_directions(solver, stepping, saves, ReversibleAdjoint(), _pair, p)


@pytest.mark.parametrize(
    "solver, ours",
    (
        pytest.param(ReversibleALF4(), ReversibleAdjoint(), id="reversible"),
        pytest.param(diffrax.Bosh3(), SymplecticAdjoint(), id="symplectic"),
    ),
)
def test_against_diffrax(solver, ours):
    """The references are right: the unrolled one, diffrax's adjoint, finite differences
    and ours are the same."""
    interval, p = (0.3, 1.9), parameters()

    def f(p, adjoint):
        return loss(p, solver, pid, save_times, interval, adjoint)

    compiled = lambda adjoint: jit(jax.value_and_grad(lambda p: f(p, adjoint)))(p)
    found, true = compiled(ours), compiled(diffrax.RecursiveCheckpointAdjoint())
    check(found, true)
    check(jax.value_and_grad(f)(p, "unrolled"), true)


@pytest.mark.slow
def test_against_finite_differences():
    interval, stepping, saves = (0.3, 1.9), step_to, save_everything
    direction, p = normal_like(parameters(), 7), parameters()

    def f(p):
        return loss(p, ReversibleALF4(), stepping, saves, interval, ReversibleAdjoint())

    value = jit(f)
    grad = jit(jax.grad(f))(p)
    pairs = zip(jax.tree.leaves(grad), jax.tree.leaves(direction))
    found = sum(jnp.vdot(g, d) for g, d in pairs)
    true = directional_difference(value, p, direction, 5e-4)
    assert abs(found - true) < 1e-8 * abs(true)
