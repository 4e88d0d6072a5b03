"""Jumps of the vector field, which a solver is told of where it starts a step."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    RecordedSteps,
    ReplayedSteps,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
)

from ...helpers import (
    adjoint_of,
    check,
    check_both_directions,
    jit,
    Stepping,
    tree_difference,
    UNROLLED,
)
from ...reference import Problem, unrolled


_slow = pytest.mark.slow
_SOLVERS = (
    pytest.param(ReversibleALF2(), id="ALF2"),
    pytest.param(ReversibleALF4(restart=1e-6), id="restarting", marks=_slow),
    pytest.param(ALF(), id="MALI", marks=_slow),
    pytest.param(Reversible(diffrax.Tsit5()), id="coupled", marks=_slow),
    pytest.param(diffrax.Bosh3(), id="Bosh3"),
)
_JUMPS = jnp.array([0.45, 0.9, 1.3])


def _vector_field(t, y, args):
    piece = jnp.searchsorted(_JUMPS, t)
    size = jnp.array([1.0, -0.5, 2.0, 0.7])[piece]
    return size * args * jnp.stack([y[1] + 0.3 * jnp.sin(t), -jnp.sin(y[0])])


def _terms(p):
    del p
    return diffrax.ODETerm(_vector_field)


_P = dict(y0=jnp.array([1.0, 0.5]), args=jnp.array(1.3))


def _controller(dtmax=None, tolerance=1e-3):
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, dtmax=dtmax)
    return diffrax.ClipStepSizeController(controller, jump_ts=_JUMPS)


class _Jumping(diffrax.AbstractStepSizeController):
    """A controller of one's own, which steps to given times and says that the vector
    field jumps at some of them: an ordinary one says so by no other means."""

    nodes: jax.Array
    jumps: jax.Array

    def wrap(self, direction):
        order = jnp.argsort(direction * self.nodes)
        return _Jumping((direction * self.nodes)[order], self.jumps[order])

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.nodes[1], jnp.array(1)

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        jump = self.jumps[state]
        # Past the jump, as `ClipStepSizeController` does.
        after = jnp.where(jump, jnp.nextafter(t1, jnp.inf), t1)
        last = jnp.minimum(state + 1, len(self.nodes) - 1)
        result = diffrax.RESULTS.successful
        return jnp.array(True), after, self.nodes[last], jump, state + 1, result


def _jumping(t0, t1):
    nodes = jnp.concatenate(
        [jnp.stack([t0, t1]), jnp.array([0.45, 0.6, 0.9, 1.1, 1.3])]
    )
    jumps = jnp.array([False, False, True, False, True, False, True])
    order = jnp.argsort(nodes)
    return Stepping(_Jumping(nodes[order], jumps[order]), None, 64)


def _clip(t0, t1):
    return Stepping(_controller(), None, 256)


def _saves(t0, t1, p):
    del p
    ts = jnp.where(t0 < t1, jnp.array([0.9, 1.0]), jnp.array([0.9, 0.45]))
    return diffrax.SaveAt(t1=True, ts=ts, steps=True)


@pytest.mark.parametrize(
    "solver, stepping",
    [
        pytest.param(
            *param.values,
            stepping,
            id=f"{param.id}-{name}",
            marks=_slow if (param.id, name) == ("Bosh3", "Clip") else param.marks,
        )
        for param in _SOLVERS
        for name, stepping in (("Clip", _clip), ("own", _jumping))
    ],
)
def test_gradient(solver, stepping):
    """Also where a controller of one's own says that there is a jump."""
    ours = adjoint_of(solver)
    check_both_directions(solver, stepping, _saves, ours, _terms, _P)


def _solve(p, solver, adjoint, **options):
    options = dict(stepsize_controller=_controller(), max_steps=2048) | options
    rest = (0.0, 1.7, None, p["y0"], p["args"])
    return diffrax.diffeqsolve(_terms(p), solver, *rest, adjoint=adjoint, **options)


def test_order():
    """The order of a smooth problem, with three jumps on the way."""

    def end(solver, dtmax, tolerance):
        controller = _controller(dtmax, tolerance)
        options = dict(stepsize_controller=controller, max_steps=4096)
        solution = _solve(_P, solver, diffrax.ForwardMode(), **options)
        return solution.ys[-1], solution.stats["num_accepted_steps"]

    end = jit(end, static_argnums=0)
    true, _ = end(diffrax.Dopri8(), 0.02, 1e-13)
    # With so large a tolerance `dtmax` alone determines the steps.
    results = [end(ReversibleALF4(), dtmax, 1e6) for dtmax in (0.06, 0.04, 0.03, 0.02)]
    steps = np.array([int(n) for _, n in results])
    errors = np.array([float(jnp.max(jnp.abs(y - true))) for y, _ in results])
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"order across three jumps: {order:.2f}, errors {errors}")
    assert abs(order - 4) < 0.15
    assert errors[0] < 1e-5


def test_replay():
    controller = RecordedSteps(_controller(), capacity=256)
    saveat = diffrax.SaveAt(t1=True, controller_state=True)
    args = (_P, ReversibleALF2(), ReversibleAdjoint())
    first = _solve(*args, stepsize_controller=controller, saveat=saveat)
    record = first.controller_state.record
    assert int(jnp.sum(record.made_jump)) == 3
    second = _solve(*args, stepsize_controller=ReplayedSteps(record))
    assert tree_difference(second.ys, first.ys) < 1e-15


@pytest.mark.parametrize("solver", (ReversibleALF2(), diffrax.Tsit5()))
def test_jump_at_the_start_with_a_solver_state(solver):
    """What the solver has cached is that before the jump."""

    def loss(y0, v0, adjoint):
        cached = (jnp.array(False), v0) if isinstance(solver, diffrax.Tsit5) else v0
        rest = (jnp.nextafter(_JUMPS[0], 1.0), 0.8, 0.05, y0, jnp.array(1.3))
        options = dict(solver_state=cached, made_jump=True, max_steps=16)
        if adjoint is UNROLLED:
            solution = unrolled(Problem(_terms, solver), {}, *rest, **options)
        else:
            solution = diffrax.diffeqsolve(
                _terms({}), solver, *rest, adjoint=adjoint, **options
            )
        return jnp.sum(solution.ys**2)

    x = (_P["y0"], _vector_field(0.45 - 1e-12, _P["y0"], 1.3))
    grad = lambda *x: jax.value_and_grad(loss, (0, 1))(*x, adjoint_of(solver))
    check(jit(grad)(*x), jax.value_and_grad(loss, (0, 1))(*x, UNROLLED))
