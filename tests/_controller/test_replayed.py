import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import (
    RecordedSteps,
    ReplayedSteps,
    ReversibleAdjoint,
    ReversibleALF2,
)

from ..helpers import (
    clip,
    jit,
    leaf_differences,
    loss,
    parameters,
    pid,
    save_times,
    solution_loss,
    solve,
    Stepping,
    UNROLLED,
)


_slow = pytest.mark.slow
_adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())


def _save_states(t0, t1, p):
    saveat = save_times(t0, t1, p)
    where = lambda s: (s.controller_state, s.solver_state)
    return eqx.tree_at(where, saveat, (True, True))


def _recorded(stepping):
    def recorded(t0, t1):
        controller = RecordedSteps(stepping(t0, t1).controller, 200)
        return eqx.tree_at(lambda s: s.controller, stepping(t0, t1), controller)

    return recorded


def _replayed(record, dt0=None):
    return lambda t0, t1: Stepping(ReplayedSteps(record), dt0)


def _solve(p, stepping, interval, adjoint=_adjoints[0], **options):
    solver = ReversibleALF2()
    return solve(p, solver, stepping, _save_states, interval, adjoint, **options)


def _scaled(p, scale):
    return p | {"y0": jtu.tree_map(lambda x: scale * x, p["y0"])}


@pytest.mark.parametrize(
    "stepping, interval, adjoint",
    (
        pytest.param(pid, (1.4, -0.3), _adjoints[0], id="PID-backward", marks=_slow),
        pytest.param(clip, (0.3, 1.9), _adjoints[0], id="Clip-forward", marks=_slow),
        pytest.param(clip, (1.4, -0.3), diffrax.ForwardMode(), id="Clip-backward"),
    ),
)
def test_same_steps_again(stepping, interval, adjoint):
    """Steps are the same bit for bit; what they find may be rounded otherwise in another
    compiled function."""

    @eqx.filter_jit
    def run(p, stepping):
        return _solve(p, stepping, interval, adjoint)

    first = run(parameters(), _recorded(stepping))
    record = first.controller_state.record
    again = run(parameters(), _Replay(record))
    assert first.stats["num_rejected_steps"] > 0
    assert again.stats["num_steps"] == record.count
    values = lambda x: (x.ys, x.solver_state)
    for of, tolerance in ((lambda x: x.ts, 0), (values, 1e-13)):
        for x, y in zip(*map(jtu.tree_leaves, (of(first), of(again))), strict=True):
            assert np.allclose(x, y, rtol=tolerance, atol=tolerance)


class _Replay(eqx.Module):
    """As `_replayed`, with the record as an argument of the compiled function."""

    record: eqx.Module

    def __call__(self, t0, t1):
        return _replayed(self.record)(t0, t1)


@pytest.mark.slow
def test_batch_and_gradient():
    """Records of unequal length, replayed and differentiated under `jax.vmap`."""
    interval = (1.4, -0.3)
    p = parameters()

    @jit
    def record(scales):
        f = lambda s: _solve(_scaled(p, s), _recorded(pid), interval)
        solutions = jax.vmap(f)(scales)
        return solutions.controller_state.record, solutions.ys

    def one(p, record, scale, adjoint):
        solution = _solve(_scaled(p, scale), _replayed(record), interval, adjoint)
        return solution_loss(solution), solution.ys

    @jit
    def replay(p, records, scales):
        def batch(p):
            f = lambda r, s: one(p, r, s, _adjoints[0])
            losses, ys = jax.vmap(f)(records, scales)
            return jnp.sum(losses), ys

        return jax.grad(batch, has_aux=True)(p)

    scales = jnp.array([0.1, 1.0, 2.5])
    records, true_ys = record(scales)
    assert len(set(records.count.tolist())) > 1
    found, ys = replay(p, records, scales)

    alone = lambda p, scale: loss(
        _scaled(p, scale), ReversibleALF2(), pid, _save_states, interval, UNROLLED
    )
    rows = [jax.grad(alone)(p, scale) for scale in scales]
    assert leaf_differences(found, jtu.tree_map(lambda *x: sum(x), *rows)) < 1e-10
    finite = lambda tree: jtu.tree_map(lambda x: jnp.where(jnp.isinf(x), 0, x), tree)
    assert leaf_differences(finite(ys), finite(true_ys)) < 1e-13


@pytest.fixture(scope="module")
def record():
    solution = _small(RecordedSteps(diffrax.PIDController(rtol=1e-3, atol=1e-3), 40))
    return solution.controller_state.record


@eqx.filter_jit
def _small(controller, t0=0.3, t1=1.9, dt0=None, **options):
    saveat = diffrax.SaveAt(t1=True, controller_state=True)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        ReversibleALF2(),
        t0,
        t1,
        dt0,
        jnp.array(0.7),
        stepsize_controller=controller,
        saveat=saveat,
        adjoint=_adjoints[0],
        **{"max_steps": 40} | options,
    )


@pytest.mark.parametrize("interval", ((0.2, 1.9), (0.3, 1.8), (1.9, 0.3)))
def test_other_interval(record, interval):
    with pytest.raises(RuntimeError, match="must start at `t0` and end at `t1`"):
        times = map(jnp.asarray, interval)
        jax.block_until_ready(_small(ReplayedSteps(record), *times))


def test_dt0(record):
    with pytest.raises(ValueError, match=r"`dt0` should be `None`"):
        _small(ReplayedSteps(record), dt0=0.1)


def test_more_max_steps_than_recorded(record):
    """Replaying needs no bound, and `max_steps` below the record fails the solve."""

    def run(max_steps):
        return _small(ReplayedSteps(record), max_steps=max_steps, throw=False)

    solution = run(None)
    assert solution.result == diffrax.RESULTS.successful
    assert solution.stats["num_steps"] == record.count
    result = run(int(record.count) - 1).result
    assert result == diffrax.RESULTS.max_steps_reached
