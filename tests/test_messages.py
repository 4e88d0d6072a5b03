"""Messages as a user meets them, in full: in eager mode, under `jax.jit` and under
`equinox.filter_jit`, at the first call and at a later one."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import pytest

from diffrax_reversible import (
    InterpolatedAdjoint,
    RecordedSteps,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    SymplecticAdjoint,
)


_cheap = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_modes = {
    "eager": lambda f: f,
    "jit": lambda f: jax.jit(f, compiler_options=_cheap),
    "filter_jit": lambda f: eqx.filter_jit(f, compiler_options=_cheap),
}
_mode = pytest.mark.parametrize("mode", _modes)


_pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)


#
# Raised where they are made, or traced
#


def _solve(solver, adjoint=ReversibleAdjoint(), terms=None, **options):
    terms = diffrax.ODETerm(lambda t, y, args: -y) if terms is None else terms
    return lambda y0: diffrax.diffeqsolve(
        terms, solver, 0.0, 1.0, 0.1, y0, adjoint=adjoint, **options
    )


def _sde(solver, adjoint=ReversibleAdjoint()):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (1,), jr.PRNGKey(0))
    diffusion = diffrax.ControlTerm(lambda t, y, args: jnp.ones((1, 1)), path)
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    if isinstance(solver, diffrax.ItoMilstein | diffrax.StratonovichMilstein):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jr.PRNGKey(0))
        diffusion = diffrax.ControlTerm(lambda t, y, args: y, path)
    return _solve(solver, adjoint, diffrax.MultiTerm(drift, diffusion))


_refused = {
    "Tsit5": (
        _solve(diffrax.Tsit5()),
        "`adjoint=ReversibleAdjoint()` undoes the steps of a reversible solver, which "
        "`solver=diffrax.Tsit5()` is not. Use `solver=diffrax.Tsit5(), "
        "adjoint=SymplecticAdjoint()`, which gives exact gradients; or, where these must "
        "not take more memory for more steps, a reversible solver, for example "
        "`solver=Reversible(diffrax.Tsit5())`; or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`, which takes any solver.",
    ),
    "Kvaerno5": (
        _solve(diffrax.Kvaerno5(), stepsize_controller=_pid),
        "`adjoint=ReversibleAdjoint()` undoes the steps of a reversible solver, which "
        "`solver=diffrax.Kvaerno5()` is not. Use `solver=diffrax.Kvaerno5(), "
        "adjoint=SymplecticAdjoint()`, which gives exact gradients; or, where these must "
        "not take more memory for more steps, a reversible solver, for example "
        "`solver=ReversibleALF4()`; or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`, which takes any solver.",
    ),
    "HalfSolver": (
        _solve(diffrax.HalfSolver(ReversibleALF4())),
        "`adjoint=ReversibleAdjoint()` undoes the steps of a reversible solver, which "
        "`solver=diffrax.HalfSolver(...)` is not. Use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`, which takes any solver; or a "
        "reversible solver, for example `solver=ReversibleALF4()`. A solver of your own "
        "must be an `AbstractReversibleSolver`.",
    ),
    "ItoMilstein": (
        _sde(diffrax.ItoMilstein()),
        "`solver=diffrax.ItoMilstein()` converges to the Itô solution of an SDE, which is "
        "not the solution of the SDE run backwards in time, so that "
        "`adjoint=ReversibleAdjoint()` does not support it. Use "
        "`solver=diffrax.ItoMilstein(), adjoint=diffrax.RecursiveCheckpointAdjoint()`; "
        "or, for the Stratonovich solution, a reversible solver that converges to it, "
        "for example `solver=diffrax.ReversibleHeun()` or "
        "`solver=Reversible(diffrax.Heun())`.",
    ),
    "Euler": (
        _sde(diffrax.Euler()),
        "`solver=diffrax.Euler()` converges to the Itô solution of an SDE, which is not "
        "the solution of the SDE run backwards in time, so that "
        "`adjoint=ReversibleAdjoint()` does not support it. Use "
        "`solver=diffrax.Euler(), adjoint=SymplecticAdjoint()`; or, for the Stratonovich "
        "solution, a reversible solver that converges to it, for example "
        "`solver=diffrax.ReversibleHeun()` or `solver=Reversible(diffrax.Heun())`.",
    ),
    "StratonovichMilstein": (
        _sde(diffrax.StratonovichMilstein()),
        "`solver=diffrax.StratonovichMilstein()` is not reversible, so that "
        "`adjoint=ReversibleAdjoint()` does not support it. Use "
        "`solver=diffrax.StratonovichMilstein(), "
        "adjoint=diffrax.RecursiveCheckpointAdjoint()`; or, for the Stratonovich "
        "solution, a reversible solver that converges to it, for example "
        "`solver=diffrax.ReversibleHeun()` or `solver=Reversible(diffrax.Heun())`.",
    ),
    "ReversibleALF4": (
        _sde(ReversibleALF4()),
        "`solver=ReversibleALF4()` is not known to converge to the Stratonovich solution "
        "of an SDE, so that `adjoint=ReversibleAdjoint()` does not support it. Use "
        "`solver=ReversibleALF4(), adjoint=diffrax.RecursiveCheckpointAdjoint()`; or, "
        "for the Stratonovich solution, a reversible solver that converges to it, for "
        "example `solver=diffrax.ReversibleHeun()` or "
        "`solver=Reversible(diffrax.Heun())`.",
    ),
    "ReversibleAdjoint": (
        _solve(ReversibleALF4(), ReversibleAdjoint),
        "`diffeqsolve(..., adjoint=ReversibleAdjoint)` was given a class, and not an "
        "instance of it. Use `adjoint=ReversibleAdjoint()`.",
    ),
    "SymplecticAdjoint": (
        _solve(diffrax.Tsit5(), SymplecticAdjoint),
        "`diffeqsolve(..., adjoint=SymplecticAdjoint)` was given a class, and not an "
        "instance of it. Use `adjoint=SymplecticAdjoint()`.",
    ),
    "InterpolatedAdjoint": (
        _solve(diffrax.Tsit5(), InterpolatedAdjoint),
        "`diffeqsolve(..., adjoint=InterpolatedAdjoint)` was given a class, and not an "
        "instance of it. Use `adjoint=InterpolatedAdjoint(nodes=...)`.",
    ),
}


# That is diffrax's, which says so before it asks the adjoint method.
@pytest.mark.filterwarnings("ignore:`ReversibleALF4` is not marked as converging")
@_mode
@pytest.mark.parametrize("case", _refused)
def test_refused(case, mode):
    f, expected = _refused[case]
    f = _modes[mode](f)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            f(jnp.ones(1))
        # JAX may add a note on hidden frames.
        assert str(error.value).partition("\n")[0] == expected


def _integer(call, value, least=1, others=" or `None`"):
    return f"`{call}` must be an integer that is at least {least}{others}; got {value}."


_adjoints = (ReversibleAdjoint, SymplecticAdjoint)
_arguments = [
    *[
        (
            lambda kind=kind, name=name, value=value: kind(**{name: value}),
            _integer(f"{kind.__name__}({name}=...)", value),
        )
        for kind in _adjoints
        for name in ("checkpoints", "capacity")
        for value in (2.5, True, 0, -1)
    ],
    *[
        (
            lambda value=value: RecordedSteps(_pid, capacity=value),
            _integer("RecordedSteps(capacity=...)", value, others=""),
        )
        for value in (2.5, True, 0)
    ],
    *[
        (
            lambda value=value: InterpolatedAdjoint(value),
            _integer("InterpolatedAdjoint(nodes=...)", value, 4, ""),
        )
        for value in (8.0, True, 3)
    ],
    *[
        (
            lambda value=value: InterpolatedAdjoint(8, quadrature=value),
            _integer(
                "InterpolatedAdjoint(quadrature=...)", value, 2, ' or "nodes" or `None`'
            ),
        )
        for value in (2.5, True, 1)
    ],
    *[
        (
            lambda value=value: InterpolatedAdjoint(8, max_steps=value),
            _integer("InterpolatedAdjoint(max_steps=...)", value),
        )
        for value in (2.5, True, 0)
    ],
    (
        lambda: Reversible(diffrax.Tsit5),
        "`Reversible(Tsit5)` was given a class, and not a solver. Use "
        "`Reversible(diffrax.Tsit5())`.",
    ),
    (
        lambda: Reversible(diffrax.Kvaerno5()),
        "`Reversible(diffrax.Kvaerno5())`: only explicit Runge-Kutta solvers can be made "
        "reversible, for example `Reversible(diffrax.Tsit5())`, and only if they do not "
        "override `step`.",
    ),
    (
        lambda: Reversible(ReversibleALF4()),
        "`Reversible(ReversibleALF4())`: `ReversibleALF4` is reversible already. Use it "
        "as it is.",
    ),
    (
        lambda: ReversibleALF4.propose_grid(1.0, jnp.int32),
        "`propose_grid(1.0, int32)` needs the dtype of the solution, which is a "
        "floating-point one, for example `jnp.float32`.",
    ),
    (
        lambda: ReversibleALF4(grid=0.3),
        "`ReversibleALF4(grid=0.3)` must be a power of two, so that its multiples are "
        "exact in floating point. `propose_grid(bound, dtype)` proposes one: where "
        "neither the solution nor the vector field is larger than 8, `grid=2.0**-20` in "
        "float32, and `grid=2.0**-49` in float64.",
    ),
]


@pytest.fixture
def unchecked():
    """Types are not checked for a user, as they are in these tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@_mode
@pytest.mark.parametrize("make, expected", _arguments)
def test_arguments(make, expected, mode, unchecked):
    del unchecked

    def f(x):
        make()
        return x

    f = _modes[mode](f)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            f(jnp.ones(1))
        assert str(error.value).partition("\n")[0] == expected


#
# Raised when it is run
#


def _relaxation(adjoint, solver=ReversibleALF2(), t1=1.0, dt0=None, **options):
    """As a function of the rate of the relaxation."""
    options = dict(stepsize_controller=_pid) | options if dt0 is None else options
    field = lambda t, y, rate: -rate * (y - jnp.cos(t))

    def loss(rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), solver, 0.0, t1, dt0, jnp.ones(1), rate,
            adjoint=adjoint, **options,
        )  # fmt: skip
        saved = solution.ys, solution.controller_state
        return sum(
            map(jnp.sum, jax.tree.leaves(eqx.filter(saved, eqx.is_inexact_array)))
        )

    return loss


_solve_line = """

It is about this solve:
  File "{file}", line {line}, in loss
    solution = diffrax.diffeqsolve("""
_ways_out = (
    "`solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`, which undoes nothing; "
    "`ReversibleAdjoint(checkpoints=...)`; float64."
)


def _loses(on_failure):
    """As every solve does, if one looks closely."""
    adjoint = ReversibleAdjoint(reversal_rtol=1e-18, on_failure=on_failure)
    return _relaxation(adjoint, ReversibleALF2(restart=None), 4.0, 0.1)


class _Case(NamedTuple):
    """A loss, a rate with which all is well, one with which it is not, and what is said
    then. `is_gradient`: by the gradient, and not by the solve itself."""

    loss: Callable
    good: float
    bad: float
    expected: str
    is_gradient: bool = True


_runs = {
    "lost": _Case(
        _loses("raise"),
        0.0,
        1.0,
        "`adjoint=ReversibleAdjoint()` has lost the solution on its way back: at t = 0.0 "
        "the state that it found differs from the one that it should have found by a "
        "relative #, which is more than 1.0e-18, so that the gradient would be wrong. "
        "Undoing steps amplifies rounding where the flow contracts, and where the solver "
        "itself damps (`Reversible(coupling_parameter=...)`, `ALF(eta=...)`). Ways out: "
        + _ways_out,
    ),
    "wrong": _Case(
        _relaxation(ReversibleAdjoint(), ReversibleALF2(restart=None), dt0=0.125),
        0.0,
        20.0,
        "The solution is wrong, and not only its gradient: the two copies of it that the "
        "reversible solver carries have come to differ by # times its size. The flow "
        "contracts, and so their difference grows. Ways out: a solver that restarts, for "
        "example `ReversibleALF4()` or `Reversible(diffrax.Tsit5())`, without "
        "`restart=None`; or `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`.",
    ),
    "restarts": _Case(
        _relaxation(ReversibleAdjoint(checkpoints=1), t1=8.0, max_steps=256),
        0.0,
        2.0,
        "The solve restarted 5 times, and `adjoint=ReversibleAdjoint(checkpoints=1)` has "
        "room for 1. A reversible solver restarts where the flow contracts, and the "
        "state before each restart must be kept. Use `ReversibleAdjoint(checkpoints=5)`, "
        "or more; or `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`.",
    ),
    "capacity": _Case(
        _relaxation(ReversibleAdjoint(capacity=4)),
        0.0,
        1.0,
        "The solve accepted 15 steps, and there is room for 4. Pass "
        "`adjoint=ReversibleAdjoint(capacity=15)`, or more.",
    ),
    "nodes": _Case(
        _relaxation(InterpolatedAdjoint(4), diffrax.Heun(), dt0=0.125),
        0.0,
        2.0,
        "`adjoint=InterpolatedAdjoint(nodes=4)` does not resolve the solution between "
        "t = 0.0 and t = 1.0: a relative error of about # is more than 1.0e-03, so that "
        "the gradient would be wrong. About `InterpolatedAdjoint(nodes=10)` would do, if "
        "the solution is smooth; where the vector field jumps, "
        "`ClipStepSizeController(jump_ts=...)`. Or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
    ),
    "adjoint equation": _Case(
        _relaxation(InterpolatedAdjoint(16, max_steps=8), diffrax.Heun()),
        0.0,
        4.0,
        "The solve of the adjoint equation has failed. Ways out: "
        "`InterpolatedAdjoint(..., max_steps=...)`, larger tolerances "
        "(`InterpolatedAdjoint(..., stepsize_controller=...)`), another solver "
        "(`InterpolatedAdjoint(..., solver=...)`), or "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
    ),
    "RecordedSteps": _Case(
        _relaxation(
            SymplecticAdjoint(),
            diffrax.Heun(),
            stepsize_controller=RecordedSteps(_pid, 4),
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
        ),
        0.0,
        4.0,
        "More steps were accepted than `RecordedSteps(capacity=4)` has room for. Pass a "
        "larger `capacity`.",
        False,
    ),
    "max_steps": _Case(
        _relaxation(
            ReversibleAdjoint(), ReversibleALF2(restart=None), t1=40.0, max_steps=128
        ),
        0.0,
        3.0,
        "`max_steps` was reached, and the two copies of the solution that the reversible "
        "solver carries have come to differ by more than the error of a step, so that "
        "their difference makes the steps short. Use a solver that restarts, without "
        "`restart=None`; or `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()`.",
        False,
    ),
    "grid": _Case(
        _relaxation(ReversibleAdjoint(), ReversibleALF2(grid=2.0**-50), dt0=0.125),
        0.0,
        -40.0,
        "With `grid=8.881784197001252e-16` the solution or the vector field has become "
        "so large that multiples of the grid are no longer exact in its dtype, and a "
        "step could not be undone bit for bit. Use a coarser grid: "
        "`propose_grid(bound, dtype)` proposes one for a bound on both.",
        False,
    ),
}


def _said(error):
    """What the error says, without how equinox or JAX frame it."""
    (text,) = re.findall(
        r"(?s)\n(?:equinox\.|_)EquinoxRuntimeError: (.*?)\n\n\n?-----", error
    )
    return text


def _without_rounding(text):
    """What is of the size of rounding, or near it, is not the same everywhere."""
    return re.sub(
        r"(a relative|differ by|error of about) [0-9][0-9.e+-]*", r"\1 #", text
    )


def _line():
    """That of the call of `diffeqsolve` in `_relaxation`."""
    lines, start = inspect.getsourcelines(_relaxation)
    (line,) = [i for i, x in enumerate(lines) if "diffrax.diffeqsolve(" in x]
    return start + line


# One of them in every mode; all of them where the lines of a program are shown.
@pytest.mark.parametrize(
    "name, mode",
    [
        pytest.param(
            name,
            mode,
            marks=[] if "filter_jit" in mode or name == "lost" else pytest.mark.slow,
        )
        for name in _runs
        for mode in _modes
    ],
)
def test_run(name, mode):
    """At the first call, and at one after another that has succeeded."""
    case = _runs[name]
    f = _modes[mode](jax.grad(case.loss) if case.is_gradient else case.loss)
    errors = _first_and_later(f, case.good, case.bad)
    for error in errors:
        said = _said(str(error))
        said, has_line, solve = said.partition("\n\nIt is about")
        assert _without_rounding(said) == case.expected
        assert bool(has_line) == case.is_gradient
        if case.is_gradient:
            expected = _solve_line.format(file=__file__, line=_line())
            assert has_line + solve == expected
        if mode == "filter_jit":
            text = str(error)
            assert "diffrax_reversible/_" not in text
            assert "diffrax.diffeqsolve(" in text
            assert text.count(said[:40]) == 1
    kinds = list(map(type, errors))
    if mode == "jit":
        # JAX's, and as with any error of equinox: where a call has succeeded before,
        # those that follow go through the compiled function alone, which raises another.
        assert kinds == _kinds_under_jit()
    elif mode == "eager" and case.is_gradient:
        # The same at both calls, and one that `except RuntimeError` catches.
        assert len(set(kinds)) == 1 and issubclass(kinds[0], RuntimeError)
    else:
        assert [kind.__name__ for kind in kinds] == ["EquinoxRuntimeError"] * 2


def _first_and_later(f, good, bad):
    def raised():
        with pytest.raises((RuntimeError, ValueError)) as error:
            jax.block_until_ready(f(bad))
        return error.value

    first = raised()
    f(good)
    return first, raised()


@functools.cache
def _kinds_under_jit():
    """Of what `equinox.error_if` alone raises."""
    f = _modes["jit"](lambda x: eqx.error_if(x, x > 0, "Too large."))
    return list(map(type, _first_and_later(f, 0.0, 1.0)))


def test_warning():
    """Of the line of the solve."""
    case = _runs["lost"]
    f = _modes["filter_jit"](jax.grad(_loses("warn")))
    f(case.good)
    for _ in range(2):
        with pytest.warns(UserWarning) as found:
            jax.block_until_ready(f(case.bad))
        (warning,) = found
        assert _without_rounding(str(warning.message)) == case.expected
        assert (warning.filename, warning.lineno) == (__file__, _line())
