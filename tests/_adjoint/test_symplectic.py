import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    EES25,
    RecordedSteps,
    Reversible,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ..helpers import (
    CONTROLLERS,
    directional_difference,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    normal_like,
    pairwise_or_product,
    parameters,
    pid,
    quick,
    save_everything,
    save_times,
    SAVES,
    step_to,
    tree_difference,
)


_slow = pytest.mark.slow
_SOLVERS = (
    pytest.param(diffrax.Heun(), id="Heun", marks=_slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
    pytest.param(diffrax.Bosh3(), id="Bosh3", marks=_slow),
    pytest.param(diffrax.Dopri8(), id="Dopri8", marks=_slow),
    pytest.param(diffrax.Dopri5(), id="Dopri5", marks=_slow),
    pytest.param(diffrax.Ralston(), id="Ralston", marks=_slow),
)
# Those that are walked back in the same way are for the slow tests.
_CONTROLLERS = quick(CONTROLLERS, "constant", "PID")
_SAVES = quick(SAVES, "end", "everything")


_ADJOINTS = (
    pytest.param(SymplecticAdjoint(), id="plain"),
    pytest.param(SymplecticAdjoint(store_stages=True), id="stages"),
    pytest.param(SymplecticAdjoint(checkpoints=3), id="checkpoints"),
    pytest.param(SymplecticAdjoint(checkpoints=2, store_stages=True), id="both"),
)


def _check(solver, stepping, saves, interval, ours):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(loss)(p, solver, stepping, saves, interval, adjoint)
            for adjoint in (ours, diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(parameters())
    assert abs(value - true_value) < 1e-13 * abs(true_value)
    assert tree_difference(grad, true_grad) < 1e-12
    assert leaf_differences(grad, true_grad) < 1e-12
    matters = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(true_grad)]
    assert sum(matters) >= len(matters) - 1


@pytest.mark.parametrize(
    "solver, stepping, saves, interval, ours",
    pairwise_or_product(_SOLVERS, _CONTROLLERS, _SAVES, INTERVALS, _ADJOINTS),
)
def test_against_recursive_checkpoints(solver, stepping, saves, interval, ours):
    _check(solver, stepping, saves, interval, ours)


@pytest.mark.parametrize(
    "stepping, saves, interval, ours",
    pairwise_or_product(_CONTROLLERS[:2], _SAVES, INTERVALS, _ADJOINTS[::2]),
)
def test_euler(stepping, saves, interval, ours):
    _check(diffrax.Euler(), stepping, saves, interval, ours)


#
# Transformations
#


@pytest.mark.parametrize("ours", _ADJOINTS[1:3])
def test_batches(ours):
    """Per-element adaptive steps, with parameters that are shared by all, by an inner
    and by an outer batch."""
    p = parameters()

    def batch(x, *sizes):
        noise = jr.normal(jr.PRNGKey(5), (*sizes, *x.shape))
        return jnp.broadcast_to(x, noise.shape) + noise

    y0 = jtu.tree_map(lambda x: batch(x, 2, 3), p["y0"])
    args = jtu.tree_map(lambda x: batch(x, 2), p["args"])
    # A frequency: so different that the numbers of steps differ.
    closed_over = jnp.array([0.3, 5.0, 12.0])

    def one(y0, args, closed_over, shared, adjoint):
        p = shared | {"y0": y0, "args": args, "closed_over": closed_over}
        return loss(p, diffrax.Tsit5(), pid, save_times, (0.3, 1.9), adjoint)

    def total(y0, args, closed_over, shared):
        f = lambda y0, closed_over: one(y0, args, closed_over, shared, ours)
        return jnp.sum(jax.vmap(f)(y0, closed_over))

    @jit
    def both(y0, args, closed_over, shared):
        f = jax.grad(total, (0, 1, 2, 3))
        found = jax.vmap(f, (0, 0, None, None))(y0, args, closed_over, shared)
        f = jax.grad(one, (0, 1, 2, 3))
        reference = diffrax.RecursiveCheckpointAdjoint()

        def each(x):
            y0, args = x
            g = lambda x: f(x[0], args, x[1], shared, reference)
            true = lax.map(g, (y0, closed_over))
            summed = jtu.tree_map(lambda x: jnp.sum(x, 0), (true[1], true[3]))
            return true[0], summed[0], true[2], summed[1]

        return found, lax.map(each, (y0, args))

    shared = {"term": p["term"], "fn": p["fn"]}
    assert leaf_differences(*both(y0, args, closed_over, shared)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("ours", _ADJOINTS[2:3])
def test_second_derivatives(ours):
    p = parameters()
    direction = normal_like(p, 6)
    f = lambda p: loss(p, diffrax.Bosh3(), step_to, save_everything, (0.3, 1.9), ours)

    @jit
    def forward(p, direction):
        grad, product = jax.jvp(jax.grad(f), (p,), (direction,))
        _, tangent = jax.jvp(f, (p,), (direction,))
        return grad, tangent, product

    grad, tangent, product = forward(p, direction)
    pairs = zip(jtu.tree_leaves(grad), jtu.tree_leaves(direction))
    assert abs(tangent - sum(jnp.vdot(g, d) for g, d in pairs)) < 1e-12 * abs(tangent)
    true = directional_difference(jit(jax.grad(f)), p, direction, 1e-4)
    assert tree_difference(product, true) < 1e-8


def test_reverse_over_reverse():
    f = lambda y: jnp.sum(_solve(y, 1.0, SymplecticAdjoint()))
    with pytest.raises(RuntimeError, match=r"jax.jacfwd\(jax.grad"):
        jax.grad(lambda y: jnp.sum(jax.grad(f)(y)))(jnp.ones(2))


#
# Contraction
#


def _solve(y0, rate, adjoint, **options):
    options = dict(solver=diffrax.Tsit5(), max_steps=1024) | options
    t0, t1, dt0 = jnp.array([0.0, 20.0, 0.05], y0.dtype)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, a: -5 * a * (y - jnp.sin(a * t)) - y**3),
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=y0,
        args=rate,
        adjoint=adjoint,
        **options,
    ).ys


@pytest.mark.parametrize("checkpoints", (None, 7))
def test_contraction(checkpoints):
    """By more than `exp(100)`, where no reversal can succeed."""
    adjoint = SymplecticAdjoint(checkpoints=checkpoints)

    def grads(adjoint, dtype):
        f = lambda y, a: jnp.sum(_solve(y, a, adjoint) ** 2)
        y0 = jnp.array([0.3, 2.0], dtype)
        return jit(jax.grad(f, 1))(y0, jnp.array(1.2, dtype))

    true = grads(diffrax.RecursiveCheckpointAdjoint(), jnp.float64)
    assert abs(grads(adjoint, jnp.float64) - true) < 1e-10 * abs(true)
    assert abs(grads(adjoint, jnp.float32) - true) < 1e-5 * abs(true)


#
# Solver states, SDEs
#


@pytest.mark.parametrize("ours", _ADJOINTS)
def test_continued_solve(ours):
    """The first stage is what an earlier solve has left, and is differentiated."""

    def one(f0, y0, rate, adjoint):
        state = (jnp.array(False), f0)
        y = _solve(y0, rate, adjoint, t1=1.0, solver_state=state)
        return jnp.sum(jnp.sin(y))

    def _solve(y0, rate, adjoint, t1, solver_state):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y + t)),
            diffrax.Tsit5(),
            0.0,
            t1,
            0.13,
            y0,
            rate,
            solver_state=solver_state,
            adjoint=adjoint,
        ).ys

    # Not the vector field, so that the difference shows.
    x = (jnp.array([0.2, -0.4]), jnp.array([0.5, 1.0]), jnp.array(1.3))

    @jit
    def grads(*x):
        adjoints = (ours, diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(one, (0, 1, 2))(*x, adjoint) for adjoint in adjoints]

    found, true = grads(*x)
    assert leaf_differences(found, true) < 1e-12


@pytest.mark.parametrize("solver", (diffrax.Euler(), diffrax.Heun()))
@pytest.mark.parametrize("ours", _ADJOINTS[2:3])
def test_sde(solver, ours):
    """Itô or Stratonovich; parameters of drift and of diffusion."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.PRNGKey(3))

    def one(y0, args, adjoint):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, a: -a[0] * y),
            diffrax.ControlTerm(lambda t, y, a: jnp.diag(jnp.cos(a[1] * y)), path),
        )
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            0.07,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=jnp.array([0.33, 1.0])),
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    @jit
    def grads(*x):
        adjoints = (ours, diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(one, (0, 1))(*x, adjoint) for adjoint in adjoints]

    found, true = grads(jnp.array([0.5, 1.0]), jnp.array([0.7, 1.3]))
    assert leaf_differences(found, true) < 1e-12


@pytest.mark.parametrize("ours", _ADJOINTS[1:3])
def test_cde(ours):
    """A solver that hands on its last stage, with a control that is differentiated."""

    def one(values, y0, weights, adjoint):
        ts = jnp.linspace(0.0, 1.0, 5)
        control = diffrax.LinearInterpolation(ts, values)
        term = diffrax.ControlTerm(
            lambda t, y, w: jnp.tanh(w @ y)[:, None] * jnp.array([[1.0, t]]), control
        )
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.11,
            y0,
            weights,
            saveat=diffrax.SaveAt(ts=jnp.array([0.33, 1.0])),
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    @jit
    def grads(*x):
        adjoints = (ours, diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(one, (0, 1, 2))(*x, adjoint) for adjoint in adjoints]

    keys = jr.split(jr.PRNGKey(0), 2)
    x = (jr.normal(keys[0], (5, 2)), jnp.array([0.5, 1.0]), jr.normal(keys[1], (2, 2)))
    found, true = grads(*x)
    assert leaf_differences(found, true) < 1e-12


#
# Refused
#


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.Kvaerno3(),
        diffrax.HalfSolver(diffrax.Tsit5()),
        diffrax.ReversibleHeun(),
        ReversibleALF4(),
        Reversible(diffrax.Tsit5()),
        EES25(),
    ),
)
def test_solvers(solver):
    with pytest.raises(ValueError, match="RecursiveCheckpointAdjoint"):
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        options = dict(solver=solver, stepsize_controller=controller)
        _solve(jnp.ones(2), 1.0, SymplecticAdjoint(), **options)


def test_unsafe_brownian_path():
    path = diffrax.UnsafeBrownianPath((2,), jr.PRNGKey(0))
    term = diffrax.ControlTerm(lambda t, y, a: jnp.eye(2), path)
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        diffrax.diffeqsolve(
            term,
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            jnp.ones(2),
            adjoint=SymplecticAdjoint(),
        )


@pytest.mark.parametrize("name", ("capacity", "checkpoints"))
def test_arguments(name):
    with pytest.raises(ValueError, match=rf"SymplecticAdjoint\({name}=...\)"):
        SymplecticAdjoint(**{name: 0})


@pytest.mark.parametrize("checkpoints", (None, 3))
def test_capacity(checkpoints):
    y0 = jnp.ones(2)
    with pytest.raises(ValueError, match="SymplecticAdjoint\\(capacity=...\\)"):
        _solve(y0, 1.0, SymplecticAdjoint(), max_steps=None)

    def grad(adjoint, **options):
        f = lambda y: jnp.sum(_solve(y, 1.0, adjoint, **options))
        return jax.block_until_ready(jit(jax.grad(f))(y0))

    few = SymplecticAdjoint(capacity=399, checkpoints=checkpoints)
    with pytest.raises(RuntimeError, match="Pass a larger `capacity`"):
        grad(few, max_steps=None)
    enough = SymplecticAdjoint(capacity=400, checkpoints=checkpoints)
    true = grad(diffrax.RecursiveCheckpointAdjoint())
    assert tree_difference(grad(enough, max_steps=None), true) < 1e-10


def test_capacity_of_adaptive_steps():
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    options = dict(stepsize_controller=controller, max_steps=None)
    y0 = jnp.ones(2)
    f = lambda adjoint: lambda y: jnp.sum(_solve(y, 1.0, adjoint, **options))
    grad = jit(jax.grad(f(SymplecticAdjoint(capacity=512))))(y0)
    options["max_steps"] = 512
    options["stepsize_controller"] = RecordedSteps(controller, 512)
    assert tree_difference(jit(jax.grad(f(SymplecticAdjoint())))(y0), grad) < 1e-14
