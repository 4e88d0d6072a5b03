"""Solves that fail: they do as in diffrax, and no gradient is finite and wrong."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ...helpers import adjoint_of, jit, tree_difference, UNROLLED
from ...reference import Problem, unrolled


_slow = pytest.mark.slow
_SOLVERS = {
    "ALF2": ReversibleALF2(),
    "ALF4": ReversibleALF4(),
    "coupled": Reversible(diffrax.Tsit5()),
    "Bosh3": diffrax.Bosh3(),
}


def _smooth(t, y, rate):
    return jnp.sin(rate * y + t)


def _not_a_number(t, y, rate):
    """From some time on."""
    return jnp.where(t < 0.4, _smooth(t, y, rate), jnp.nan)


def _explosion(t, y, rate):
    """Infinite at `t = 1 / (rate * y0)`."""
    return rate * y**2


_constant = diffrax.ConstantStepSize()
_pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
_bounded = diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmin=1e-2, force_dtmin=False)
_results = diffrax.RESULTS
# The vector field, the controller, `max_steps`, the result, and whether the gradient of
# the steps that were accepted is finite.
_FAILURES = {
    "NaN at given steps": (
        *(_not_a_number, _constant, 32),
        *(_results.successful, False),
    ),
    "NaN at adaptive steps": (
        *(_not_a_number, _pid, 32),
        *(_results.max_steps_reached, True),
    ),
    "max_steps at given steps": (
        *(_smooth, _constant, 5),
        *(_results.max_steps_reached, True),
    ),
    "max_steps at adaptive steps": (
        *(_explosion, _pid, 20),
        *(_results.max_steps_reached, True),
    ),
    "dt_min": (*(_explosion, _bounded, 128), *(_results.dt_min_reached, True)),
}
_quick = {
    *(("ALF2", name) for name in _FAILURES),
    ("Bosh3", "NaN at adaptive steps"),
    ("Bosh3", "max_steps at given steps"),
}


def _loss(y0, rate, solver, vector_field, controller, max_steps, adjoint, throw=False):
    saveat = diffrax.SaveAt(t1=True, ts=jnp.array([0.15, 1.7]), steps=2)
    rest = (0.0, 2.0, 0.1, y0, rate)
    options = dict(saveat=saveat, stepsize_controller=controller, max_steps=max_steps)
    terms = lambda p: diffrax.ODETerm(vector_field)
    if adjoint is UNROLLED:
        solution = unrolled(Problem(terms, solver), {}, *rest, **options)
        stats, result = solution.num_steps, None
    else:
        options |= dict(adjoint=adjoint, throw=throw)
        solution = diffrax.diffeqsolve(terms({}), solver, *rest, **options)
        stats, result = solution.stats["num_steps"], solution.result
    # `inf` is what diffrax leaves where nothing was saved.
    ys = jnp.where(jnp.isinf(solution.ys), 0, solution.ys)
    return jnp.sum(jnp.sin(ys)), (solution.ys, stats, result)


_y0, _rate = jnp.array([0.9, 0.7]), jnp.array(1.3)
_value_and_grad = jax.value_and_grad(_loss, (0, 1), has_aux=True)


@pytest.mark.parametrize(
    "solver, failure",
    [
        pytest.param(s, f, marks=() if (s, f) in _quick else _slow)
        for s in _SOLVERS
        for f in _FAILURES
    ],
)
def test_without_throw(solver, failure):
    """The gradient is that of the accepted steps: rejected ones do not matter, which may
    have been no numbers."""
    solver = _SOLVERS[solver]
    *what, result, is_finite = _FAILURES[failure]
    ours = adjoint_of(solver)
    found = jit(lambda *x: _value_and_grad(*x, solver, *what, ours))(_y0, _rate)
    (_, (ys, steps, found_result)), grad = found
    (_, (true_ys, true_steps, _)), true = _value_and_grad(
        *(_y0, _rate), solver, *what, UNROLLED
    )
    assert found_result == result
    if result != diffrax.RESULTS.dt_min_reached:
        assert steps == true_steps
        assert jnp.allclose(ys, true_ys, rtol=1e-9, equal_nan=True)
    if not is_finite:
        assert all(bool(jnp.any(jnp.isnan(x))) for x in (*grad, *true))
    elif result != diffrax.RESULTS.dt_min_reached:
        # Close to an explosion rounding is amplified.
        assert tree_difference(grad, true) < 1e-6
    else:
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in grad)


@pytest.mark.parametrize("solver", ("ALF2", "Bosh3"))
def test_throw(solver):
    solver = _SOLVERS[solver]
    *what, _, _ = _FAILURES["max_steps at adaptive steps"]

    @eqx.filter_jit
    def grad(y0):
        f = lambda y0: _loss(y0, 1.3, solver, *what, adjoint_of(solver), True)[0]
        return jax.grad(f)(y0)

    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jax.block_until_ready(grad(_y0))


@pytest.mark.parametrize(
    "solver, ours",
    (
        ("ALF2", ReversibleAdjoint(checkpoints=2)),
        ("Bosh3", SymplecticAdjoint()),
    ),
)
@pytest.mark.slow
def test_one_of_a_batch(solver, ours):
    """The others have their gradients, the one that failed has that of its steps."""
    y0 = jnp.array([[0.2, 0.1], [0.9, 0.7], [0.0, 0.3]])
    what = (_SOLVERS[solver], _explosion, _pid, 40)
    total = lambda y0: jnp.sum(jax.vmap(lambda y: _loss(y, _rate, *what, ours)[0])(y0))
    found = jit(jax.grad(total))(y0)
    one = jax.grad(lambda y: _loss(y, _rate, *what, UNROLLED)[0])
    for i in range(3):
        assert tree_difference(found[i], one(y0[i])) < (1e-6 if i == 1 else 1e-9)


@pytest.mark.parametrize("adaptive", (False, True))
def test_interval_of_length_zero(adaptive):
    """Nothing is stepped, and what is saved is the start."""

    def f(y0, args):
        fn = lambda t, y, args: y * args
        subs = [
            diffrax.SubSaveAt(t0=True, ts=jnp.array([0.4, 0.4]), t1=True, steps=True),
            diffrax.SubSaveAt(t1=True, fn=fn),
        ]
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_smooth),
            ReversibleALF2(),
            0.4,
            0.4,
            0.1,
            y0,
            args,
            saveat=diffrax.SaveAt(subs=subs, solver_state=True),
            stepsize_controller=_pid if adaptive else _constant,
            adjoint=ReversibleAdjoint(),
            max_steps=8,
        )
        ys = jtu.tree_map(lambda x: jnp.where(jnp.isinf(x), 0, x), solution.ys)
        return jnp.sum(ys[0]) + jnp.sum(ys[1]) + jnp.sum(solution.solver_state.copy)

    found = jit(jax.grad(f, (0, 1)))(_y0, _rate)
    true = lambda y, a: jnp.sum(3 * y + y * a + _smooth(0.4, y, a))
    assert tree_difference(found, jax.grad(true, (0, 1))(_y0, _rate)) < 1e-12
