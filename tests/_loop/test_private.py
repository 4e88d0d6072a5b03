"""What is private to diffrax and known here: if this fails, `_loop/state.py` and what it
says of diffrax has to be read again."""

import dataclasses

import diffrax
import jax.numpy as jnp


class _Seen(Exception):
    pass


class _Look(diffrax.AbstractAdjoint):
    def loop(self, *, init_state, **kwargs):
        raise _Seen(init_state)


def test_fields_of_state():
    try:
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Euler(),
            0.0,
            1.0,
            0.25,
            1.0,
            saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.0])),
            adjoint=_Look(),
        )
    except _Seen as e:
        (state,) = e.args
    names = lambda x: [field.name for field in dataclasses.fields(x)]
    assert names(state) == [
        *("y", "tprev", "tnext", "made_jump", "solver_state", "controller_state"),
        *("progress_meter_state", "result"),
        *("num_steps", "num_accepted_steps", "num_rejected_steps"),
        *("save_state", "dense_ts", "dense_infos", "dense_save_index"),
        *("event_tprev", "event_tnext", "event_dense_info"),
        *("event_values", "event_mask"),
    ]
    assert names(state.save_state) == ["saveat_ts_index", "ts", "ys", "save_index"]
    # Of `ConstantStepSize`: steps completed, their number, where they start and end.
    assert isinstance(state.controller_state, tuple)
    is_integer = [jnp.issubdtype(x.dtype, jnp.integer) for x in state.controller_state]
    assert is_integer == [True, True, False, False]
