"""Adjoint methods and solvers side by side."""

import math
import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from diffrax_reversible import (
    AdjointFigures,
    compare_adjoints,
    Comparison,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    SymplecticAdjoint,
)


class _Model(eqx.Module):
    """With what is not differentiated, too."""

    weight: jax.Array
    steps: int
    activation: object


_model = _Model(jr.normal(jr.PRNGKey(0), (2, 2)), 8, jnp.tanh)


def _loss(model, solver, adjoint):
    field = lambda t, y, args: model.activation(model.weight @ y)

    def one(y0):
        dt0 = 1.0 / model.steps
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), solver, 0.0, 1.0, dt0, y0, adjoint=adjoint,
            max_steps=model.steps + 1,
        ).ys  # fmt: skip

    return jnp.sum(jax.vmap(one)(jnp.array([[0.3, 0.5], [1.0, 0.2]])) ** 2)


_checkpoints = (diffrax.Heun(), diffrax.RecursiveCheckpointAdjoint())
_candidates = {
    "checkpoints": _checkpoints,
    "symplectic": (diffrax.Heun(), SymplecticAdjoint()),
    "reversible": (Reversible(diffrax.Heun()), ReversibleAdjoint()),
    "lost": (ReversibleALF2(restart=None), ReversibleAdjoint(reversal_rtol=1e-300)),
    "refused": (diffrax.Heun(), ReversibleAdjoint()),
}


@pytest.fixture(scope="module")
def comparison():
    # As a user calls it.
    with jax.numpy_dtype_promotion("standard"):
        return compare_adjoints(_loss, _model, _candidates, repeats=3, verbose=False)


def test_figures(comparison):
    assert isinstance(comparison, Comparison)
    assert comparison.reference == "checkpoints"
    assert list(comparison.figures) == list(_candidates)
    for name in ("checkpoints", "symplectic", "reversible"):
        found = comparison.figures[name]
        assert found.failure is None
        assert found.seconds > 0 and found.compile_seconds > 0
        assert found.temp_bytes > 0
        assert found.num_steps == 8
    true = jax.grad(lambda w: _loss(eqx.tree_at(lambda m: m.weight, _model, w),
                                    *_checkpoints))(_model.weight)  # fmt: skip
    found = comparison.figures["checkpoints"].gradient
    assert jnp.allclose(found.weight, true, rtol=1e-12)
    assert found.steps is None
    assert comparison.figures["checkpoints"].difference == 0
    assert comparison.figures["symplectic"].difference < 1e-12
    # Another solver, another solution.
    assert 1e-8 < comparison.figures["reversible"].difference < 1e-2


def test_reversal(comparison):
    report = comparison.figures["reversible"].reversal
    assert report.loss.shape == (2,)
    assert np.all(report.loss < report.rtol)
    assert comparison.figures["symplectic"].reversal is None


def test_failures(comparison):
    """They say why, and the others are measured all the same."""
    lost, refused = (comparison.figures[name] for name in ("lost", "refused"))
    assert lost.gradient is None and refused.seconds is None
    assert lost.failure.startswith(
        "RuntimeError: `adjoint=ReversibleAdjoint()` has lost the solution on its way back"
    )
    assert lost.failure.endswith("`ReversibleAdjoint(checkpoints=...)`; float64.")
    assert refused.failure.startswith(
        "ValueError: `adjoint=ReversibleAdjoint()` undoes the steps of a reversible solver"
    )


def test_table(comparison):
    head, *rows = str(comparison).splitlines()
    columns = (
        "candidate", "time", "compile time", "temp memory", "steps",
        "gradient difference", "loss of reversal",
    )  # fmt: skip
    assert re.split(r"\s{2,}", head) == list(columns)
    rows = {row.split()[0]: re.split(r"\s{2,}", row) for row in rows[:5]}
    assert rows["checkpoints"][5] == "(reference)"
    for name in ("checkpoints", "symplectic", "reversible"):
        assert re.fullmatch(r"[\d.]+ m?s", rows[name][1])
        assert re.fullmatch(r"[\d.]+ [KMG]iB", rows[name][3])
        assert rows[name][4] == "8"
    assert re.fullmatch(r"\d\.\de-\d\d of \d\.\de-\d\d", rows["reversible"][6])
    assert rows["lost"] == ["lost", "failed"]
    assert "has lost the solution" in str(comparison)
    assert all(len(line) <= 110 for line in str(comparison).splitlines())


def test_unknown_is_left_out():
    """What nothing is known of has no column; what only one knows nothing of, a dash."""
    figures = {
        "a": AdjointFigures(seconds=2.5, compile_seconds=0.01, difference=0.0),
        "b": AdjointFigures(seconds=2e-3, difference=math.nan, num_steps=10_000),
    }
    assert str(Comparison(figures, "a")) == (
        "candidate      time  compile time    temp memory   steps  gradient difference\n"
        "a            2.50 s     10.000 ms  not available       -          (reference)\n"
        "b          2.000 ms             -  not available  10,000                  nan"
    )


@pytest.mark.slow
def test_failed_reference(capsys):
    """There is nothing to compare with, and the rest is there."""
    candidates = {name: _candidates[name] for name in ("refused", "symplectic")}
    found = compare_adjoints(_loss, _model, candidates, repeats=1)
    assert found.reference == "refused"
    assert found.figures["symplectic"].difference is None
    assert found.figures["symplectic"].seconds > 0
    assert capsys.readouterr().out == f"{found}\n"


@pytest.mark.parametrize(
    "options, message",
    (
        (
            dict(candidates={}),
            "`compare_adjoints(candidates=...)` must not be empty.",
        ),
        (
            dict(reference="none"),
            "`compare_adjoints(reference='none')` must be one of the candidates: "
            "'checkpoints'.",
        ),
        (
            dict(repeats=0),
            "`compare_adjoints(repeats=...)` must be an integer that is at least 1; got 0.",
        ),
    ),
)
def test_arguments(options, message):
    options = dict(candidates={"checkpoints": _checkpoints}) | options
    with pytest.raises(ValueError) as error:
        compare_adjoints(_loss, _model, **options)
    assert str(error.value) == message
