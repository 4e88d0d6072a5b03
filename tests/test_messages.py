"""Messages as a user meets them, in full: in eager mode, under `jax.jit` and under
`equinox.filter_jit`, at the first call and at a later one."""

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


def _relaxation(adjoint, solver=ReversibleALF2(restart=None), **options):
    """Of which the rate is differentiated. At a rate of zero all is well."""
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)

    def loss(rate):
        solution = diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, 0.125, jnp.ones(1), rate, adjoint=adjoint, **options
        )
        return jnp.sum(solution.ys)

    return loss


_lost = (
    "`adjoint=ReversibleAdjoint()` has lost the solution on its way back: at t = 0.0 the "
    "state that it found{} differs from the one that it should have found by a relative "
)
