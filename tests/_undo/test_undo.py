"""Solves that are undone."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    EES25,
    EES27,
    RecordedRestarts,
    RecordedSteps,
    ReplayedSteps,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleYoshida4,
    undo,
)

from ..helpers import (
    FIXED,
    INTERVALS,
    jit,
    PAIRS,
    parameters,
    quick,
    SOLVERS,
    term,
    times,
    tree_difference,
)


_kinds = [pytest.param(x, id=x) for x in ("constant", "StepTo", "recorded", "replayed")]
_save = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)


def recorded(solver, capacity=128):
    """The solver with a record of its restarts, if it is one that restarts."""
    restarts = getattr(solver, "restart", None) is not None
    return RecordedRestarts(solver, capacity) if restarts else solver


def pendulum(solver):
    """It does not contract."""
    if isinstance(solver.term_structure, tuple):
        f = diffrax.ODETerm(lambda t, p, args: p)
        g = diffrax.ODETerm(lambda t, q, args: -args * jnp.sin(q))
        return (f, g), (jnp.array([1.0]), jnp.array([0.5]))
    field = lambda t, y, args: jnp.stack([y[1], -args * jnp.sin(y[0])])
    return diffrax.ODETerm(field), jnp.array([1.0, 0.5])


def largest(x, y):
    """The largest difference."""
    pairs = zip(jtu.tree_leaves(x), jtu.tree_leaves(y))
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


_nearly = (
    pytest.param(EES25(), id="EES25"),
    pytest.param(EES27(), id="EES27", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("solver", (*SOLVERS, *FIXED, *PAIRS, *_nearly))
def test_round_trip(solver):
    """Over 8, 50 and 1,000 constant steps."""
    solver = recorded(solver, 1024)
    terms, y0 = pendulum(solver)

    @jit
    def there_and_back(y0, t1, dt0, rate):
        args = (dt0, y0, rate)
        end = diffrax.diffeqsolve(
            terms, solver, 0.0, t1, *args, saveat=_save, max_steps=None
        )
        start = undo(terms, solver, end, dt0, rate)
        return start.ys, start.ts, end.stats["num_accepted_steps"], end.ys

    for number, dt0 in ((8, 0.1), (50, 0.1), (1000, 0.02)):
        t1 = jnp.array(number * dt0)
        ys, ts, steps, y1 = there_and_back(y0, t1, t1 / number, jnp.array(1.3))
        error = largest(jtu.tree_map(lambda y: y[-1], ys), y0)
        print(f"{number} steps: {error}")
        assert steps == number and ts[-1] == 0
        assert largest(jtu.tree_map(lambda y: y[-1], y1), y0) > 0.1
        assert error < 1e-12


@pytest.mark.parametrize("kind", quick(_kinds, "constant", "recorded"))
@pytest.mark.parametrize("interval", quick(INTERVALS, "backward"))
def test_steps_and_times(kind, interval):
    """The states in between, and times inside of steps, are those of the solve."""
    t0, t1 = interval
    solver, p, dt0 = recorded(ReversibleALF4()), parameters(), None
    pid = RecordedSteps(diffrax.PIDController(rtol=1e-5, atol=1e-5), 64)
    nodes = times(t0, t1, 0.0, 0.1, 0.35, 0.5, 0.83, 1.0).at[0].set(t0).at[-1].set(t1)
    controller = pid if kind == "recorded" else diffrax.StepTo(nodes)
    ts = times(t0, t1, 0.03, 0.1, 0.62, 0.9)
    options: dict = dict(max_steps=64)
    y0, args = p["y0"], p["args"]
    if kind == "constant":
        controller, dt0 = diffrax.ConstantStepSize(), (t1 - t0) / 7.3
    elif kind == "replayed":
        solve = lambda c: diffrax.diffeqsolve(
            *(term(p), solver, t0, t1, dt0, y0, args),
            stepsize_controller=c,
            saveat=_save,
            **options,
        )
        controller = ReplayedSteps(solve(pid).controller_state.record)
    options |= dict(stepsize_controller=controller)

    @jit
    def there_and_back(p):
        def saveat(ts, **kwargs):
            subs = [
                diffrax.SubSaveAt(ts=ts),
                diffrax.SubSaveAt(ts=ts, fn=lambda t, y, args: t * y["a"]),
                diffrax.SubSaveAt(steps=True),
            ]
            return diffrax.SaveAt(subs=subs, dense=True, **kwargs)

        problem = (term(p), solver)
        rest = (dt0, p["y0"], p["args"])
        solve = lambda saveat: diffrax.diffeqsolve(
            *problem, t0, t1, *rest, saveat=saveat, **options
        )
        end, inside = solve(_save), solve(saveat(ts))
        back = undo(*problem, end, dt0, p["args"], saveat=saveat(ts[::-1]), **options)
        at = jax.vmap(back.evaluate)(ts), jax.vmap(inside.evaluate)(ts)
        number = end.stats["num_accepted_steps"]
        return back.ys, inside.ys, back.ts, inside.ts, at, number

    found, true, found_ts, true_ts, dense, number = there_and_back(p)
    reverse = lambda xs: jtu.tree_map(lambda x: x[::-1], xs)
    assert tree_difference(reverse(found[:2]), true[:2]) < 1e-12
    assert tree_difference(reverse(found_ts[:2]), true_ts[:2]) < 1e-15
    assert tree_difference(*dense) < 1e-12
    # All but the end, and the start.
    number = int(number)
    inner = lambda xs: jtu.tree_map(lambda x: x[: number - 1], xs)
    steps = (inner(found[2]), inner(found_ts[2]))
    assert number > 4
    assert tree_difference(reverse(steps), inner((true[2], true_ts[2]))) < 1e-12
    assert found_ts[2][number - 1] == t0


@pytest.mark.parametrize(
    "solver",
    (
        ReversibleALF4(),
        pytest.param(Reversible(diffrax.Tsit5()), marks=pytest.mark.slow),
        pytest.param(diffrax.ReversibleHeun(), marks=pytest.mark.slow),
    ),
    ids=lambda x: type(x).__name__,
)
def test_batch_of_adaptive_steps(solver):
    solver = recorded(solver, 256)
    tolerance = 1e-3 if isinstance(solver, diffrax.ReversibleHeun) else 1e-5
    pid = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    controller = RecordedSteps(pid, 2048)
    terms, _ = pendulum(solver)

    def there(y0, rate):
        return diffrax.diffeqsolve(
            *(terms, solver, 0.0, 10.0, 0.1, y0, rate),
            saveat=_save,
            stepsize_controller=controller,
            max_steps=2048,
        )

    def back(end, rate):
        return undo(terms, solver, end, None, rate, stepsize_controller=controller).ys

    y0 = jr.normal(jr.PRNGKey(0), (256, 2))
    rates = jnp.exp(jr.normal(jr.PRNGKey(1), (256,)))
    end = jax.jit(jax.vmap(there))(y0, rates)
    found = jax.jit(jax.vmap(back))(end, rates)[:, -1]
    numbers = end.stats["num_accepted_steps"]
    print(f"{numbers.min()} to {numbers.max()} steps: {largest(found, y0)}")
    assert len(set(numbers.tolist())) > 20
    assert largest(found, y0) < 1e-11


@pytest.mark.parametrize(
    "solver, number",
    (
        (ReversibleALF2, 50),
        pytest.param(ReversibleALF2, 1000, marks=pytest.mark.slow),
        pytest.param(ReversibleALF4, 1000, marks=pytest.mark.slow),
        pytest.param(ReversibleALF6, 1000, marks=pytest.mark.slow),
        pytest.param(ReversibleYoshida4, 1000, marks=pytest.mark.slow),
    ),
)
@pytest.mark.parametrize(
    "vmap",
    (
        pytest.param(False, id="alone", marks=pytest.mark.slow),
        pytest.param(True, id="vmap"),
    ),
)
def test_every_bit(solver, number, vmap):
    """In float32, with steps that are known to the last bit."""
    grid = solver.propose_grid(16.0, jnp.float32)
    solver, zero = solver(grid=grid), jnp.float32(0)
    key = jr.PRNGKey(0)
    mlp = eqx.nn.MLP(4, 4, 16, 1, activation=jnp.tanh, key=key, dtype=jnp.float32)

    def field(t, y, args):
        push = mlp(y) * jnp.cos(t)
        return jnp.concatenate([-y[2:], y[:2]]) + jnp.float32(0.3) * push

    terms, t1 = diffrax.ODETerm(field), jnp.float32(0.02 * number)
    nodes = jnp.linspace(zero, t1, number + 1, dtype=jnp.float32).at[-1].set(t1)
    constant = RecordedSteps(diffrax.ConstantStepSize(), number)
    y0 = jnp.round(jr.normal(key, (256, 4), jnp.float32) / grid) * grid
    wrap = jax.vmap if vmap else lambda f: f
    y0 = y0 if vmap else y0[0]
    for controller, dt0 in (
        (diffrax.StepTo(nodes), None),
        (constant, jnp.float32(0.02)),
    ):

        def there(y0):
            return diffrax.diffeqsolve(
                *(terms, solver, zero, t1, dt0, y0),
                saveat=_save,
                stepsize_controller=controller,
                max_steps=None,
            )

        def back(end):
            return undo(terms, solver, end, dt0, stepsize_controller=controller).ys

        end = jax.jit(wrap(there))(y0)
        found = jax.jit(wrap(back))(end)[..., -1, :]
        assert found.dtype == jnp.float32
        assert not jnp.array_equal(end.ys[..., -1, :], y0)
        assert jnp.array_equal(found, y0)


def test_jumps():
    """The vector field jumps between two steps."""
    field = lambda t, y, args: jnp.where(t < 0.7, -y[::-1], jnp.sin(3 * y) + 2)
    terms, solver = diffrax.ODETerm(field), recorded(ReversibleALF4())
    controller = RecordedSteps(
        diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-6, atol=1e-6), jump_ts=jnp.array([0.7])
        ),
        256,
    )
    options = dict(stepsize_controller=controller)

    @jit
    def there_and_back(y0):
        end = diffrax.diffeqsolve(
            terms, solver, 0.0, 2.0, 0.1, y0, saveat=_save, max_steps=256, **options
        )
        record = end.controller_state.record
        return undo(terms, solver, end, **options).ys[-1], jnp.sum(record.made_jump)

    y0 = jnp.array([0.3, -0.4])
    found, jumps = there_and_back(y0)
    assert jumps == 1
    assert largest(found, y0) < 1e-12


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.ReversibleHeun(),
        pytest.param(ReversibleALF2(), marks=pytest.mark.slow),
        pytest.param(Reversible(diffrax.Heun()), marks=pytest.mark.slow),
    ),
    ids=lambda x: type(x).__name__,
)
@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
def test_stochastic(solver):
    @jit
    def there_and_back(y0, key):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), key)
        drift = diffrax.ODETerm(lambda t, y, args: jnp.sin(y))
        noise = diffrax.ControlTerm(lambda t, y, args: 0.3 * jnp.cos(y), path)
        problem = (diffrax.MultiTerm(drift, noise), solver)
        end = diffrax.diffeqsolve(*problem, 0.0, 1.0, 0.02, y0, saveat=_save)
        return undo(*problem, end, 0.02).ys[-1], end.ys[-1]

    y0 = jnp.array([0.3, 0.9])
    found, y1 = there_and_back(y0, jr.PRNGKey(3))
    assert largest(y1, y0) > 0.1
    assert largest(found, y0) < 1e-12


def test_in_two_parts():
    """A solve that goes on from the solver state of another one is undone to that."""
    solver = recorded(ReversibleALF4(restart=1e-6))
    terms, y0 = pendulum(solver)

    @jit
    def there_and_back(y0):
        solve = lambda t0, t1, y0, **kwargs: diffrax.diffeqsolve(
            terms, solver, t0, t1, 0.1, y0, 1.3, saveat=_save, **kwargs
        )
        first = solve(0.0, 2.0, y0)
        state = first.solver_state
        second = solve(2.0, 3.0, first.ys[-1], solver_state=state)
        saveat = diffrax.SaveAt(t1=True, solver_state=True)
        middle = undo(terms, solver, second, 0.1, 1.3, saveat=saveat)
        where = lambda s: (s.ys, s.solver_state)
        first = eqx.tree_at(where, first, (middle.ys, middle.solver_state))
        return undo(terms, solver, first, 0.1, 1.3).ys[-1], middle.ys[-1], state

    found, middle, state = there_and_back(y0)
    assert state.record.count == 19
    assert largest(found, y0) < 1e-13


def test_no_steps():
    solver = recorded(ReversibleALF4())
    terms, y0 = pendulum(solver)
    end = diffrax.diffeqsolve(terms, solver, 1.0, 1.0, 0.1, y0, 1.3, saveat=_save)
    start = undo(terms, solver, end, 0.1, 1.3)
    assert jnp.array_equal(start.ys[-1], y0) and start.ts[-1] == 1.0


def test_ended_early():
    """By an event that is not located, or by `max_steps`."""
    solver = recorded(ReversibleALF4())
    terms, y0 = pendulum(solver)
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0)
    for options in (dict(event=event), dict(max_steps=7, throw=False)):
        end = diffrax.diffeqsolve(
            terms, solver, 0.0, 10.0, 0.1, y0, 1.3, saveat=_save, **options
        )
        assert end.ts[-1] < 5
        start = undo(terms, solver, end, 0.1, 1.3)
        assert largest(start.ys[-1], y0) < 1e-13
