import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import RecordedSteps, ReversibleAdjoint, ReversibleALF2

from ..helpers import (
    clip,
    CONTROLLERS,
    INTERVALS,
    jit,
    parameters,
    pid,
    quick,
    solve,
)


_adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())


def _record(p, stepping, interval, adjoint, capacity=200, **options):
    def recorded(t0, t1):
        controller = RecordedSteps(stepping(t0, t1).controller, capacity)
        return eqx.tree_at(lambda s: s.controller, stepping(t0, t1), controller)

    def saves(t0, t1, p):
        del t0, t1, p
        return diffrax.SaveAt(t0=True, steps=True, controller_state=True)

    solution = solve(p, ReversibleALF2(), recorded, saves, interval, adjoint, **options)
    stats = {key: x for key, x in solution.stats.items() if key != "max_steps"}
    return solution.controller_state.record, solution.ts, stats


def _check_record(record, ts, stats):
    count = int(record.count)
    assert count == stats["num_accepted_steps"] > 1
    assert record.t0s.shape == record.t1s.shape == (200,)
    assert jnp.array_equal(record.t0s[:count], ts[:count])
    assert jnp.array_equal(record.t1s[:count], ts[1 : count + 1])
    assert jnp.all(jnp.isposinf(record.t0s[count:]))
    assert jnp.all(jnp.isposinf(record.t1s[count:]))


@pytest.mark.parametrize("adjoint", (_adjoints[0], diffrax.ForwardMode()))
@pytest.mark.parametrize("stepping", quick(CONTROLLERS, "Clip"))
def test_record(stepping, adjoint):
    record = jit(lambda p, t0, t1: _record(p, stepping, (t0, t1), adjoint))
    for (interval,) in (x.values for x in INTERVALS):
        *found, stats = record(parameters(), *interval)
        _check_record(*found, stats)
        assert (stats["num_rejected_steps"] > 0) == (stepping in (pid, clip))


@pytest.mark.parametrize(
    "adjoint", (_adjoints[0], pytest.param(_adjoints[1], marks=pytest.mark.slow))
)
def test_batch_and_capacity(adjoint):
    """Elements have records of their own, each of which must have room."""
    p = parameters()

    def batch(capacity):
        def one(scale):
            y0 = jtu.tree_map(lambda x: scale * x, p["y0"])
            return _record(p | {"y0": y0}, pid, (1.4, -0.3), adjoint, capacity)

        return jit(jax.vmap(one))(jnp.array([0.1, 1.0, 2.5]))

    found = batch(200)
    assert len(set(found[0].count.tolist())) > 1
    for i in range(3):
        _check_record(*jtu.tree_map(lambda x: x[i], found))
    count = int(jnp.max(found[0].count))
    with pytest.raises(Exception, match=rf"`RecordedSteps\(capacity={count - 1}\)`"):
        jax.block_until_ready(batch(count - 1))


@pytest.mark.parametrize("capacity", (0, -3))
def test_capacity_too_small(capacity):
    with pytest.raises(ValueError, match=r"`RecordedSteps\(capacity=\.\.\.\)`"):
        RecordedSteps(diffrax.PIDController(rtol=1e-3, atol=1e-3), capacity=capacity)


def test_continued_record():
    """A passed `controller_state` goes on with the record of the solve before."""
    p = parameters()
    controller = RecordedSteps(pid(0.0, 1.0).controller, 200)

    def half(p, t0, t1, dt0, controller_state):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y + 3 * t)),
            ReversibleALF2(),
            t0,
            t1,
            dt0,
            p["closed_over"],
            p["args"]["rate"],
            stepsize_controller=controller,
            controller_state=controller_state,
            saveat=diffrax.SaveAt(steps=True, controller_state=True),
            adjoint=ReversibleAdjoint(),
            max_steps=200,
        )

    @jit
    def both(p):
        first = half(p, 0.0, 1.0, 0.5, None)
        return first, half(p, 1.0, 2.0, 0.1, first.controller_state)

    first, second = both(p)
    n, m = (int(s.stats["num_accepted_steps"]) for s in (first, second))
    record = second.controller_state.record
    assert record.count == n + m and n > 1 and m > 1
    ts = jnp.concatenate([first.ts[:n], second.ts[:m]])
    assert jnp.array_equal(record.t1s[: n + m], ts)
    assert jnp.array_equal(record.t0s[: n + m], jnp.append(0.0, ts[:-1]))
