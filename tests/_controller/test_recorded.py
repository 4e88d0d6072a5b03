import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import RecordedSteps, ReversibleAdjoint, ReversibleALF4

from ..helpers import (
    clip,
    CONTROLLERS,
    INTERVALS,
    jit,
    leaf_differences,
    loss,
    pairwise_or_product,
    parameters,
    pid,
    save_times,
    solve,
)


_adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
_adjoint_params = (
    pytest.param(_adjoints[0], id="ours"),
    pytest.param(_adjoints[1], id="reference"),
)


def _record(p, stepping, interval, adjoint, capacity=40, **options):
    def recorded(t0, t1):
        controller = RecordedSteps(stepping(t0, t1).controller, capacity)
        return eqx.tree_at(lambda s: s.controller, stepping(t0, t1), controller)

    def saves(t0, t1, p):
        del t0, t1, p
        return diffrax.SaveAt(t0=True, steps=True, controller_state=True)

    solution = solve(p, ReversibleALF4(), recorded, saves, interval, adjoint, **options)
    return solution.controller_state.record, solution.ts, solution.stats


def _check_record(record, ts, stats):
    count = int(record.count)
    assert count == stats["num_accepted_steps"] > 1
    assert record.t0s.shape == record.t1s.shape == (40,)
    assert jnp.array_equal(record.t0s[:count], ts[:count])
    assert jnp.array_equal(record.t1s[:count], ts[1 : count + 1])
    assert jnp.all(jnp.isposinf(record.t0s[count:]))
    assert jnp.all(jnp.isposinf(record.t1s[count:]))


@pytest.mark.parametrize(
    "stepping, interval, adjoint",
    pairwise_or_product(CONTROLLERS, INTERVALS, _adjoint_params),
)
def test_record(stepping, interval, adjoint):
    found = eqx.filter_jit(_record)(parameters(), stepping, interval, adjoint)
    _check_record(*found)
    rejected = found[2]["num_rejected_steps"]
    assert (rejected > 0) == (stepping in (pid, clip))


@pytest.mark.parametrize("adjoint", _adjoints)
def test_record_of_batch(adjoint):
    p = parameters()

    @jit
    def records(scales):
        def one(scale):
            y0 = jtu.tree_map(lambda x: scale * x, p["y0"])
            return _record(p | {"y0": y0}, pid, (1.4, -0.3), adjoint)

        return jax.vmap(one)(scales)

    found = records(jnp.array([0.1, 1.0, 2.5]))
    assert len(set(found[0].count.tolist())) > 1
    for i in range(3):
        _check_record(*jtu.tree_map(lambda x: x[i], found))


@pytest.mark.parametrize(
    "adjoint, batched",
    ((_adjoints[0], True), (_adjoints[0], False), (_adjoints[1], True)),
)
def test_capacity_exceeded(adjoint, batched):
    p = parameters()

    @eqx.filter_jit
    def counts(scales, capacity):
        def one(scale):
            y0 = jtu.tree_map(lambda x: scale * x, p["y0"])
            record, _, _ = _record(
                p | {"y0": y0}, pid, (0.3, 1.9), adjoint, capacity=capacity
            )
            return record.count

        return jax.vmap(one)(scales) if batched else one(scales)

    scales = jnp.array([0.1, 2.0]) if batched else jnp.array(2.0)
    count = int(jnp.max(counts(scales, 40)))
    assert jnp.max(counts(scales, count)) == count
    message = rf"`RecordedSteps\(capacity={count - 1}\)`"
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(counts(scales, count - 1))


@pytest.mark.parametrize("capacity", (0, -3))
def test_capacity_too_small(capacity):
    with pytest.raises(ValueError, match=r"`RecordedSteps\(capacity=\.\.\.\)`"):
        RecordedSteps(diffrax.PIDController(rtol=1e-3, atol=1e-3), capacity=capacity)


def test_gradient_with_record():
    """Also vmapped, and of the same value as without it."""
    p = parameters()

    def recorded(t0, t1):
        controller = RecordedSteps(pid(t0, t1).controller, 40)
        return eqx.tree_at(lambda s: s.controller, pid(t0, t1), controller)

    def one(p, scale, stepping, adjoint):
        y0 = jtu.tree_map(lambda x: scale * x, p["y0"])
        solver, interval = ReversibleALF4(), (0.3, 1.9)
        return loss(p | {"y0": y0}, solver, stepping, save_times, interval, adjoint)

    @jit
    def grads(p, scales):
        ours, reference = _adjoints
        f = lambda p: jnp.sum(jax.vmap(lambda s: one(p, s, recorded, ours))(scales))
        each = lambda s: jax.grad(one)(p, s, pid, reference)
        true = jtu.tree_map(lambda x: jnp.sum(x, 0), lax.map(each, scales))
        single = [jax.grad(one)(p, scales[0], recorded, a) for a in _adjoints]
        return jax.grad(f)(p), true, *single

    batch, true_batch, single, true_single = grads(p, jnp.array([0.1, 1.0, 2.5]))
    assert leaf_differences(batch, true_batch) < 1e-10
    assert leaf_differences(single, true_single) < 1e-10


def test_continued_record():
    """A passed `controller_state` goes on with the record of the solve before."""
    p = parameters()
    controller = RecordedSteps(pid(0.0, 1.0).controller, 40)

    def half(p, t0, t1, dt0, controller_state):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y + 3 * t)),
            ReversibleALF4(),
            t0,
            t1,
            dt0,
            p["closed_over"],
            p["args"]["rate"],
            stepsize_controller=controller,
            controller_state=controller_state,
            saveat=diffrax.SaveAt(steps=True, controller_state=True),
            adjoint=ReversibleAdjoint(),
            max_steps=40,
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
