"""Effects in a vector field, and what is printed, reported and raised meanwhile."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    InterpolatedAdjoint,
    ReversibleAdjoint,
    ReversibleALF2,
    SymplecticAdjoint,
)


_METHODS = (
    pytest.param(ReversibleALF2(restart=None), ReversibleAdjoint(), id="reversible"),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint(), id="symplectic"),
)


def _solve(field, y0, args, solver, adjoint, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        1.0,
        0.25,
        y0,
        args,
        adjoint=adjoint,
        max_steps=8,
        **options,
    )


@pytest.mark.parametrize(
    "solver, adjoint",
    (
        *_METHODS,
        pytest.param(diffrax.Bosh3(), InterpolatedAdjoint(8), id="interpolated"),
    ),
)
@pytest.mark.parametrize("differentiate", (False, True))
def test_ordered_effects_refused(solver, adjoint, differentiate):
    def field(t, y, args):
        jax.debug.print("{}", t, ordered=True)
        return -args * y

    f = lambda y, a: jnp.sum(_solve(field, y, a, solver, adjoint).ys)
    f = jax.grad(f) if differentiate else f
    message = r"(?s)ordered.*RecursiveCheckpointAdjoint"
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(f).lower(jnp.ones(2), 1.3)


@pytest.mark.parametrize("solver, adjoint", _METHODS)
def test_unordered_effects(solver, adjoint):
    """Run as often as the vector field and `SaveAt(fn=...)` are called."""
    calls = {"field": [], "fn": []}

    def field(t, y, args):
        jax.debug.callback(lambda t: calls["field"].append(t), t)
        return -y * args

    def fn(t, y, args):
        jax.debug.callback(lambda t: calls["fn"].append(t), t)
        return y**2

    saveat = diffrax.SaveAt(t0=True, ts=[0.1, 0.2, 0.7], t1=True, fn=fn)
    value = lambda y, a: jnp.sum(_solve(field, y, a, solver, adjoint, saveat=saveat).ys)

    def count(f):
        for values in calls.values():
            values.clear()
        jax.block_until_ready(jax.jit(f)(1.0, 2.0))
        jax.effects_barrier()
        return len(calls["field"]), sorted(float(t) for t in calls["fn"])

    num_field, ts = count(value)
    # Four steps of a solver that hands on the last stage, or starts with the first.
    per_step = 2 if isinstance(solver, ReversibleALF2) else 3
    stages = 4 * per_step
    assert num_field == stages + 1
    np.testing.assert_allclose(ts, [0.0, 0.1, 0.2, 0.7, 1.0])
    num_field, ts = count(jax.grad(value))
    # Values of `fn` that are saved inside of steps are differentiated in the sweep: in two
    # of the steps, each of which a reversible solver must first undo to know them.
    if isinstance(solver, ReversibleALF2):
        assert num_field == 2 * stages + 1 + 2 * per_step
    np.testing.assert_allclose(ts, [0.0, 0.1, 0.1, 0.2, 0.2, 0.7, 0.7, 1.0])


def test_progress_meter(capfd):
    """Prints what it prints of a solve that is not differentiated."""

    def value(y0, adjoint=ReversibleAdjoint()):
        options = dict(progress_meter=diffrax.TextProgressMeter())
        field = lambda t, y, args: -args * y
        solution = _solve(field, y0, 1.3, ReversibleALF2(), adjoint, **options)
        return jnp.sum(solution.ys)

    def printed(f):
        jax.block_until_ready(jax.jit(f)(jnp.ones(2)))
        jax.effects_barrier()
        return capfd.readouterr().out.splitlines()

    true = printed(lambda y0: value(y0, diffrax.ForwardMode()))
    assert true[0] == "0.00%" and true[-1] == "100.00%" and len(true) > 3
    assert printed(value) == true
    assert printed(jax.grad(value)) == true


@pytest.mark.parametrize("differentiate", (False, True))
def test_error_in_vector_field(differentiate):
    def field(t, y, args):
        return eqx.error_if(y, y > 2.0, "The vector field is not defined here.")

    def f(y0):
        return jnp.sum(
            _solve(field, y0, None, ReversibleALF2(), ReversibleAdjoint()).ys
        )

    f = eqx.filter_jit(jax.grad(f) if differentiate else f)
    f(jnp.array(0.5))
    with pytest.raises(RuntimeError, match="is not defined here"):
        jax.block_until_ready(f(jnp.array(1.0)))
