from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import (
    AbstractALFComposition,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
)
from diffrax_reversible._solver.updates.restart import with_copy

from ...helpers import (
    copies,
    jit,
    leaf_differences,
    loss,
    parameters,
    pid,
    save_times,
    SOLVERS,
    step_to,
    term,
    tree_difference,
    without_restarts,
)


def _order(solver: Any) -> int:
    return solver.order(diffrax.ODETerm(lambda t, y, args: y))


# The orders above 4 need ranges of steps of their own: see test_alf_order.py.
# diffrax's own `ReversibleHeun` does not step back by itself.
_OURS = [p for p in SOLVERS if hasattr(p.values[0], "backward_step")]
_low_order = [p for p in _OURS if _order(*p.values) <= 4]


# MALI's damping amplifies rounding in every step back, here by 1.67 ** 1000.
_undamped = [p for p in _OURS if p.id != "MALI damped"]


def _nonautonomous_a(t, y, args):
    del args
    a, b = y
    return jnp.stack(
        [
            b + 0.3 * jnp.sin(t) * a**2,
            -a - 0.2 * b * a**2 + 0.4 * jnp.cos(2 * t) * b,
        ]
    )


def _nonautonomous_b(t, y, args):
    del args
    a, b, c = y
    return jnp.stack(
        [
            jnp.sin(b) + 0.2 * t * c / (1 + a**2),
            -a * c + 0.5 * jnp.cos(t),
            a * b - 0.3 * c + 0.2 * jnp.sin(t * a),
        ]
    )


def _lotka_volterra(t, y, args):
    del t, args
    a, b = y
    return jnp.stack([a * (b - 2), b * (1 - a)])


_problems = (
    pytest.param(_nonautonomous_a, (1.0, 0.5), id="non-autonomous A"),
    pytest.param(_nonautonomous_b, (0.6, -0.4, 0.9), id="non-autonomous B"),
    pytest.param(_lotka_volterra, (2.0, 2.0), id="Lotka-Volterra"),
)


def _reference(field, y0, t0, ts):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        t0,
        ts[-1],
        None,
        y0,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-14, atol=1e-14), step_ts=ts
        ),
        max_steps=100_000,
    )
    return solution.ys


def _walk(field, solver, y0, nodes):
    """`y` and the solver state at the last of `nodes`."""
    terms = diffrax.ODETerm(field)
    v0 = solver.init(terms, nodes[0], nodes[1], y0, None)

    def body(carry, interval):
        y, v = carry
        y, _, _, v, _ = solver.step(terms, *interval, y, None, v, False)
        return (y, v), None

    carry, _ = lax.scan(body, (y0, v0), (nodes[:-1], nodes[1:]))
    return carry


def _fitted_order(sizes, errors):
    slope, _ = np.polyfit(np.log(sizes), np.log(errors), 1)
    return slope


_slow = pytest.mark.slow
_unequal = pytest.mark.parametrize(
    "equal",
    (pytest.param(True, id="equal", marks=_slow), pytest.param(False, id="unequal")),
)


def _all_but(index, params):
    """These are slow."""
    return [
        pytest.param(*p.values, id=p.id, marks=() if i == index else _slow)
        for i, p in enumerate(params)
    ]


@_unequal
@pytest.mark.parametrize("field, y0", _all_but(1, _problems[:2]))
@pytest.mark.parametrize("solver", _low_order)
def test_order(solver, field, y0, equal):
    """Of `y`, and of the solver state as an approximation of the vector field."""
    t0, t1 = 0.3, 3.3
    y0 = jnp.array(y0)
    true_y = _reference(field, y0, t0, jnp.array([t1]))[0]
    # The second copy of a coupled solver is one of the solution.
    coupled = isinstance(solver, Reversible)
    true_v = true_y if coupled else field(t1, true_y, None)
    order = solver.order(diffrax.ODETerm(field))
    walk = jit(lambda nodes: _walk(field, solver, y0, nodes))
    # Of a low order the leading term is alone only in small steps.
    counts = np.array([80, 120, 180, 270]) * {1: 32, 2: 2}.get(order, 1)
    # The same uneven spacing at every number of steps, refined: random steps that are
    # drawn anew would scatter around the order.
    knots = np.cumsum(np.append(0, np.random.default_rng(0).uniform(0.4, 1.6, 10)))
    errors_y, errors_v = [], []
    for count in counts:
        nodes = np.linspace(0, 1, count + 1)
        if not equal:
            nodes = np.interp(nodes, np.linspace(0, 1, 11), knots / knots[-1])
        y, v = walk(jnp.asarray(t0 + (t1 - t0) * nodes))
        errors_y.append(float(jnp.linalg.norm(y - true_y)))
        errors_v.append(float(jnp.linalg.norm(copies(v) - true_v)))
    found = _fitted_order(1 / counts, errors_y), _fitted_order(1 / counts, errors_v)
    print(f"order of y {found[0]:.2f}, of the solver state {found[1]:.2f}")
    assert min(errors_y + errors_v) > 2e-13
    assert found == pytest.approx((order, order), abs=0.15)


@pytest.mark.parametrize("field, y0", _all_but(0, _problems))
@pytest.mark.parametrize("solver", _low_order)
def test_error_estimate(solver, field, y0):
    """Scales as it says and is above the true local error, but not by far."""
    terms = diffrax.ODETerm(field)
    t0, y0 = 0.3, jnp.array(y0)
    sizes = jnp.array([0.1, 0.07, 0.05, 0.035, 0.025])

    @jit
    def local(h):
        v0 = solver.init(terms, t0, t0 + h, y0, None)
        y1, estimate, *_ = solver.step(terms, t0, t0 + h, y0, None, v0, False)
        true = _reference(field, y0, t0, jnp.stack([t0 + h]))[0]
        return jnp.linalg.norm(estimate), jnp.linalg.norm(y1 - true)

    estimates, _ = np.array([local(h) for h in sizes]).T
    order = _fitted_order(sizes, estimates)
    # The error is of a higher order than its estimate, so that the factor grows without
    # bound as the steps shrink: look at steps that are used.
    estimates, errors = np.array([local(h) for h in (0.4, 0.3, 0.2, 0.12)]).T
    factors = estimates / errors
    print(f"order of the estimate {order:.2f}, factors {factors.round(1)}")
    scale = 1.0
    if isinstance(solver, AbstractALFComposition):
        # By which the estimate is enlarged on purpose.
        scale = solver.composition.error_scale
    assert min(errors) > 1e-13
    assert order == pytest.approx(solver.error_order(terms), abs=0.15)
    # At the largest step, and at the smallest, where the factor is largest.
    factors = factors / scale
    assert 1 < min(factors) * scale and factors[0] < 30 and max(factors) < 100


def _compare_step(solver, terms, t0, t1, y0, v0, args):
    y1, _, dense_info, v1, _ = solver.step(terms, t0, t1, y0, args, v0, False)
    y, dense, v, result = solver.backward_step(
        terms, t0, t1, y1, args, (2 * t0 - t1,), v1, False
    )
    return ((y, copies(v)), dense), ((y0, copies(v0)), dense_info), result


@pytest.mark.parametrize("solver", _OURS)
def test_backward_step_inverts_step(solver):
    """In both directions of time."""
    p = parameters()
    terms = term(p)

    @jit
    def compare(t0, t1):
        v0 = solver.init(terms, t0, t1, p["y0"], p["args"])
        # Off the vector field, as after many steps.
        off = jtu.tree_map(lambda x: 1.1 * x + 0.1, copies(v0))
        v0 = with_copy(v0, off)
        return _compare_step(solver, terms, t0, t1, p["y0"], v0, p["args"])

    for t0, t1 in ((0.3, 0.7), (0.3, 0.1)):
        found, true, result = compare(t0, t1)
        assert result == diffrax.RESULTS.successful
        print(f"back: {[tree_difference(*pair) for pair in zip(found, true)]}")
        assert tree_difference(found[0], true[0]) < 1e-13
        assert tree_difference(found[1], true[1]) < 1e-12


@_unequal
@pytest.mark.parametrize("solver", _undamped)
def test_thousand_steps_and_back(solver, equal):
    y0 = jnp.array([0.6, -0.4, 0.9])
    terms, solver = diffrax.ODETerm(_nonautonomous_b), without_restarts(solver)
    steps = jr.uniform(jr.PRNGKey(0), (1000,), minval=0.3, maxval=1.0)
    steps = jnp.ones(1000) if equal else steps
    nodes = jnp.append(0.0, jnp.cumsum(steps)) * (10 / jnp.sum(steps))

    @jit
    def there_and_back():
        v0 = solver.init(terms, nodes[0], nodes[1], y0, None)
        y1, v1 = _walk(_nonautonomous_b, solver, y0, nodes)

        def body(carry, interval):
            y, v = carry
            y, _, v, _ = solver.backward_step(
                terms, *interval, y, None, (interval[0],), v, False
            )
            return (y, v), None

        intervals = (nodes[:-1], nodes[1:])
        found, _ = lax.scan(body, (y1, v1), intervals, reverse=True)
        return copies((found, (y0, v0))), y1

    (found, true), y1 = there_and_back()
    assert tree_difference(y1, y0) > 0.1
    difference = leaf_differences(found, true)
    print(f"1,000 steps and back: {difference:.1e}")
    assert difference < 1e-10


@_slow
@pytest.mark.parametrize("stepping", (step_to, pid))
def test_other_adjoints(stepping):
    """The solvers are ordinary solvers to any other adjoint method."""

    @jit
    def derivatives(p):
        def f(adjoint, **options):
            return lambda p: loss(
                p,
                ReversibleALF4(),
                stepping,
                save_times,
                (0.3, 1.9),
                adjoint,
                **options,
            )

        tangent = jtu.tree_map(jnp.ones_like, p)
        grad = jax.grad(f(diffrax.RecursiveCheckpointAdjoint()))(p)
        direct = jax.grad(f(diffrax.DirectAdjoint()))(p)
        _, forward = jax.jvp(f(diffrax.ForwardMode()), (p,), (tangent,))
        return grad, direct, forward

    grad, direct, forward = derivatives(parameters())
    assert leaf_differences(grad, direct) < 1e-12
    total = sum(jnp.sum(x) for x in jtu.tree_leaves(grad))
    assert abs(total - forward) < 1e-12 * abs(forward)


@pytest.mark.parametrize(
    "solver", (ReversibleALF2(), pytest.param(ReversibleALF4(), marks=_slow))
)
def test_half_solver(solver):
    y0 = jnp.array([1.0, 0.5])

    def f(y0, tolerance):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_nonautonomous_a),
            diffrax.HalfSolver(solver),
            0.0,
            3.0,
            None,
            y0,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )
        return solution.ys[0]

    true = _reference(_nonautonomous_a, y0, 0.0, jnp.array([3.0]))[0]
    f = jit(f)
    errors = [float(jnp.linalg.norm(f(y0, x) - true)) for x in (1e-4, 1e-6)]
    assert errors[1] < 0.1 * errors[0] < 1e-3


def test_dense_output():
    """Third-order Hermite interpolation of `y` and the solver state."""
    y0 = jnp.array([1.0, 0.5])
    ts = jnp.linspace(0, 3, 32)[1:]
    true = _reference(_nonautonomous_a, y0, 0.0, ts)

    @jit
    def error(dt0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_nonautonomous_a),
            ReversibleALF4(),
            0.0,
            3.0,
            dt0,
            y0,
            saveat=diffrax.SaveAt(dense=True, ts=ts),
        )
        assert solution.ys is not None
        dense = jax.vmap(solution.evaluate)(ts)
        return jnp.max(jnp.abs(dense - true)), jnp.max(jnp.abs(dense - solution.ys))

    sizes = 3 / np.array([21, 33, 51, 81])
    errors, differences = np.array([error(h) for h in sizes]).T
    assert max(differences) < 1e-14
    assert 3.6 < _fitted_order(sizes, errors) < 4.6
