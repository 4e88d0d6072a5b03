import re

import diffrax
import pytest

from diffrax_reversible import (
    ALF,
    EES25,
    EES27,
    InterpolatedAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
    StormerVerlet,
    SymplecticAdjoint,
    SymplecticComposition4,
    SymplecticComposition6,
    SymplecticComposition8,
)


def _cite(capsys, **arguments):
    diffrax.citation(**arguments)
    return capsys.readouterr().out


def test_solver_and_adjoint(capsys):
    out = _cite(capsys, solver=ReversibleALF4(), adjoint=ReversibleAdjoint())
    for title in (
        "Adaptive higher order reversible integrators",
        "A memory efficient and reverse accurate integrator",
        "An asynchronous leapfrog method {II}",
    ):
        assert title in out
    assert "constant memory" in out
    assert out.count("{") == out.count("}")
    keys = re.findall(r"^@\w+\{(.*),$", out, re.M)
    assert len(keys) == len(set(keys)) > 0


@pytest.mark.parametrize("solver", (ReversibleALF2(), ReversibleALF4()))
def test_solver_alone(capsys, solver):
    out = _cite(capsys, solver=solver)
    assert "@misc{maslovskaya2024adaptive," in out
    assert "constant memory" not in out
    assert "yoshida1990" not in out


def test_yoshida(capsys):
    out = _cite(capsys, solver=ReversibleYoshida4())
    assert "@article{yoshida1990construction," in out
    assert "@misc{maslovskaya2024adaptive," in out


def test_adjoint_alone(capsys):
    out = _cite(capsys, adjoint=ReversibleAdjoint())
    assert "@inproceedings{zhuang2021mali," in out
    assert "mutze2013" not in out


def test_others_unchanged(capsys):
    out = _cite(
        capsys, solver=diffrax.Tsit5(), adjoint=diffrax.RecursiveCheckpointAdjoint()
    )
    assert "tsitouras2011runge" in out
    assert "maslovskaya" not in out


@pytest.mark.parametrize(
    "solver, key",
    (
        (ALF(), "zhuang2021mali"),
        (ReversibleALF6(), "blanes2002practical"),
        (ReversibleALF8(), "sofroniou2005derivation"),
        (ReversibleYoshida6(), "yoshida1990construction"),
        (ReversibleYoshida8(), "kahan1997composition"),
    ),
)
def test_fractions(capsys, solver, key):
    out = _cite(capsys, solver=solver, adjoint=ReversibleAdjoint())
    keys = re.findall(r"^@\w+\{(.*),$", out, re.M)
    assert len(keys) == len(set(keys))
    assert {key, "mutze2013asynchronous", "maslovskaya2024adaptive"} <= set(keys)


@pytest.mark.parametrize(
    "solver, key",
    [
        (Reversible(diffrax.Tsit5()), "mccallum2024efficient"),
        (EES25(), "shmelev2025explicit"),
        (EES27(), "shmelev2025explicit"),
        (StormerVerlet(), "hairer2003geometric"),
        (SymplecticComposition4(), "blanes2002practical"),
        (SymplecticComposition6(), "blanes2002practical"),
        (SymplecticComposition8(), "kahan1997composition"),
    ],
)
def test_other_solvers(capsys, solver, key):
    assert f"{{{key}," in _cite(capsys, solver=solver)


def test_symplectic_adjoint(capsys):
    out = _cite(capsys, solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint())
    assert "@inproceedings{matsubara2021symplectic," in out
    assert "zhuang2021" not in out


def test_interpolated_adjoint(capsys):
    adjoint = InterpolatedAdjoint(16)
    out = _cite(capsys, solver=diffrax.Tsit5(), adjoint=adjoint)
    assert out.count("@inproceedings{daulbaev2020interpolation,") == 1
    assert "constant memory" not in out
