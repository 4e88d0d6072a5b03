import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    RecordedSteps,
    ReplayedSteps,
    ReversibleAdjoint,
    ReversibleALF4,
)

from ..helpers import (
    clip,
    jit,
    leaf_differences,
    parameters,
    pid,
    save_times,
    solution_loss,
    solve,
    Stepping,
)


_adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())


def _save_states(t0, t1, p):
    saveat = save_times(t0, t1, p)
    where = lambda s: (s.controller_state, s.solver_state)
    return eqx.tree_at(where, saveat, (True, True))


def _recorded(stepping):
    def recorded(t0, t1):
        controller = RecordedSteps(stepping(t0, t1).controller, 40)
        return eqx.tree_at(lambda s: s.controller, stepping(t0, t1), controller)

    return recorded


def _replayed(record, dt0=None):
    return lambda t0, t1: Stepping(ReplayedSteps(record), dt0)


def _solve(p, stepping, interval, adjoint=_adjoints[0], **options):
    solver = ReversibleALF4()
    return solve(p, solver, stepping, _save_states, interval, adjoint, **options)


def _scaled(p, scale):
    return p | {"y0": jtu.tree_map(lambda x: scale * x, p["y0"])}


@pytest.mark.parametrize(
    "stepping, interval, adjoint",
    (
        pytest.param(pid, (1.4, -0.3), _adjoints[0], id="PID-backward"),
        pytest.param(clip, (0.3, 1.9), _adjoints[0], id="Clip-forward"),
        pytest.param(clip, (1.4, -0.3), _adjoints[1], id="Clip-backward-reference"),
    ),
)
def test_bit_for_bit(stepping, interval, adjoint):
    # Each by itself: compiled together they may be rounded differently.
    @eqx.filter_jit
    def run(p, stepping):
        return _solve(p, stepping, interval, adjoint)

    first = run(parameters(), _recorded(stepping))
    record = first.controller_state.record
    again = run(parameters(), _Replay(record))
    assert first.stats["num_rejected_steps"] > 0
    assert again.stats["num_steps"] == record.count
    for x, y in zip(
        jtu.tree_leaves((first.ts, first.ys, first.solver_state)),
        jtu.tree_leaves((again.ts, again.ys, again.solver_state)),
        strict=True,
    ):
        assert jnp.array_equal(x, y)


class _Replay(eqx.Module):
    """As `_replayed`, with the record as an argument of the compiled function."""

    record: eqx.Module

    def __call__(self, t0, t1):
        return _replayed(self.record)(t0, t1)


def test_batch_and_gradient():
    """Records of unequal length, replayed and differentiated under `jax.vmap`."""
    interval = (1.4, -0.3)
    p = parameters()
    ours, reference = _adjoints

    @jit
    def record(scales):
        f = lambda s: _solve(_scaled(p, s), _recorded(pid), interval)
        solutions = jax.vmap(f)(scales)
        return solutions.controller_state.record, solutions.ys

    @jit
    def replay(p, records, scales):
        def one(p, record, scale, adjoint):
            solution = _solve(_scaled(p, scale), _replayed(record), interval, adjoint)
            return solution_loss(solution), solution.ys

        def batch(p):
            f = lambda r, s: one(p, r, s, ours)
            losses, ys = jax.vmap(f)(records, scales)
            return jnp.sum(losses), ys

        each = lambda x: jax.grad(one, has_aux=True)(p, *x, reference)[0]
        found, ys = jax.grad(batch, has_aux=True)(p)
        true = lax.map(each, (records, scales))
        return found, jtu.tree_map(lambda x: jnp.sum(x, 0), true), ys

    scales = jnp.array([0.1, 1.0, 2.5])
    records, true_ys = record(scales)
    assert len(set(records.count.tolist())) > 1
    found, true, ys = replay(p, records, scales)
    assert leaf_differences(found, true) < 1e-10
    finite = lambda tree: jtu.tree_map(lambda x: jnp.where(jnp.isinf(x), 0, x), tree)
    assert leaf_differences(finite(ys), finite(true_ys)) < 1e-13


def _one_record():
    p = parameters()
    solution = eqx.filter_jit(_solve)(p, _recorded(pid), (0.3, 1.9))
    return p, solution.controller_state.record


@pytest.mark.parametrize("interval", ((0.2, 1.9), (0.3, 1.8), (1.9, 0.3)))
def test_other_interval(interval):
    p, record = _one_record()
    with pytest.raises(RuntimeError, match="must start at `t0` and end at `t1`"):
        jax.block_until_ready(eqx.filter_jit(_solve)(p, _replayed(record), interval))


def test_dt0():
    p, record = _one_record()
    with pytest.raises(ValueError, match=r"`dt0` should be `None`"):
        _solve(p, _replayed(record, 0.1), (0.3, 1.9))


def test_more_max_steps_than_recorded():
    """Replaying needs no bound, and `max_steps` below the record fails the solve."""
    p, record = _one_record()

    @eqx.filter_jit
    def run(max_steps):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            ReversibleALF4(),
            0.3,
            1.9,
            None,
            p["closed_over"],
            stepsize_controller=ReplayedSteps(record),
            adjoint=ReversibleAdjoint(),
            max_steps=max_steps,
            throw=False,
        )
        return solution.result, solution.stats["num_steps"]

    result, num_steps = run(None)
    assert result == diffrax.RESULTS.successful and num_steps == record.count
    result, _ = run(int(record.count) - 1)
    assert result == diffrax.RESULTS.max_steps_reached
