"""`SymplecticAdjoint` with implicit solvers, against `RecursiveCheckpointAdjoint` with
the same solver, and finite differences."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jaxtyping import Array

from diffrax_reversible import SymplecticAdjoint

from ...helpers import (
    check,
    directional_difference,
    jit,
    leaf_differences,
    normal_like,
    weigh,
)


class _SDIRK2(diffrax.AbstractSDIRK):
    """A user's: its first stage is implicit, and none is handed on."""

    root_finder: optx.AbstractRootFinder = optx.Newton(rtol=1e-12, atol=1e-12)
    root_find_max_steps: int = 40

    gamma = 1 - 0.5**0.5
    tableau = diffrax.ButcherTableau(
        c=np.array([1.0]),
        b_sol=np.array([1 - gamma, gamma]),
        b_error=np.array([0.5 - gamma, gamma - 0.5]),
        a_lower=(np.array([1 - gamma]),),
        a_diagonal=np.array([gamma, gamma]),
        a_predictor=(np.array([1.0]),),
        c1=gamma,
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        del terms
        return 2


_IMEX = (diffrax.KenCarp3, diffrax.KenCarp4, diffrax.KenCarp5, diffrax.Sil3)


def _solver(kind):
    root_finder = optx.Newton(rtol=1e-12, atol=1e-12)
    return kind(root_finder=root_finder, root_find_max_steps=40)


class _Stiff(eqx.Module):
    """Drawn to a moving point; with parameters of its own."""

    matrix: Array

    def __call__(self, t, y, args):
        x = jnp.append(*y)
        z = -args["rate"] * (x - jnp.cos(t)) ** 3 - args["rate"] * (x - jnp.sin(t))
        z = z + jnp.tanh(self.matrix @ x)
        return z[:2], z[2]


def _coupling(t, y, args):
    return jax.tree.map(lambda x: jnp.sin(args["shift"] * x + t), y)


def _parameters():
    return dict(
        y0=(jnp.array([1.0, 0.3]), jnp.array(-0.5)),
        args=dict(rate=jnp.array([20.0, 3.0, 1.0]), shift=jnp.array(1.3)),
        matrix=jnp.array([[0.3, -2.0, 1.0], [1.0, 0.2, 0.4], [-1.0, 2.0, 0.1]]),
    )


def _terms(kind, p):
    stiff, rest = diffrax.ODETerm(_Stiff(p["matrix"])), diffrax.ODETerm(_coupling)
    if kind in _IMEX:
        return diffrax.MultiTerm(rest, stiff)
    both = lambda t, y, a: jax.tree.map(jnp.add, stiff.vf(t, y, a), rest.vf(t, y, a))
    return diffrax.ODETerm(both)


def _constant():
    return diffrax.ConstantStepSize()


def _adaptive():
    return diffrax.PIDController(rtol=1e-3, atol=1e-4)


def _loss(p, kind, adjoint, controller, interval=(0.0, 1.0), **options):
    t0, t1 = interval
    sign = 1 if t1 > t0 else -1
    saveat = diffrax.SaveAt(ts=t0 + (t1 - t0) * jnp.array([0.3, 0.33, 1.0]))
    options = dict(saveat=saveat, max_steps=256) | options
    solution = diffrax.diffeqsolve(
        _terms(kind, p),
        _solver(kind),
        *(t0, t1, sign * 0.07),
        p["y0"],
        p["args"],
        adjoint=adjoint,
        stepsize_controller=controller(),
        **options,
    )
    return weigh((solution.ys, solution.solver_state))


def _check(p, *args, ours=(), **options):
    def found(p, adjoint):
        f = lambda p: _loss(p, args[0], adjoint, *args[1:], **options)
        return jit(jax.value_and_grad(f))(p)

    true = found(p, diffrax.RecursiveCheckpointAdjoint())
    for keywords in ours:
        check(found(p, SymplecticAdjoint(**keywords)), true, tolerance=1e-8)


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, controller, keywords",
    (
        (diffrax.Kvaerno3, _adaptive, dict(checkpoints=4)),
        (diffrax.KenCarp3, _constant, dict(keep="stages")),
        (diffrax.ImplicitEuler, _constant, {}),
    ),
)
def test_gradients(kind, controller, keywords):
    _check(_parameters(), kind, controller, ours=(keywords,))


def test_robertson():
    """Very stiff, with a root finder as it is by default: the steps that are made again
    are those of the solve."""

    def field(t, y, rates):
        a, b, c = y
        first, last = rates[2] * b * c - rates[0] * a, rates[1] * b**2
        return jnp.stack([first, -first - last, last])

    def loss(y0, rates, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Kvaerno5(),
            *(0.0, 100.0, 1e-4),
            y0,
            rates,
            adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
            max_steps=512,
        )
        return weigh(solution.ys)

    def found(adjoint):
        f = jax.value_and_grad(lambda *x: loss(*x, adjoint), (0, 1))
        return jit(f)(jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4]))

    true = found(diffrax.RecursiveCheckpointAdjoint())
    check(found(SymplecticAdjoint(checkpoints=12)), true)


_KINDS = (
    diffrax.ImplicitEuler,
    diffrax.Kvaerno3,
    diffrax.Kvaerno4,
    diffrax.Kvaerno5,
    *_IMEX,
    _SDIRK2,
)


@_slow
@pytest.mark.parametrize("controller", (_constant, _adaptive))
@pytest.mark.parametrize("kind", _KINDS)
def test_gradients_of_all(kind, controller):
    every = ({}, dict(keep="stages"), dict(checkpoints=4))
    _check(_parameters(), kind, controller, ours=every)


@_slow
@pytest.mark.parametrize("kind", (diffrax.Kvaerno5, diffrax.KenCarp4))
@pytest.mark.parametrize(
    "options",
    (
        dict(interval=(0.8, 0.3)),
        dict(saveat=diffrax.SaveAt(t0=True, steps=True, solver_state=True)),
        dict(
            event=diffrax.Event(
                lambda t, y, args, **_: y[1] - 0.2, optx.Newton(1e-10, 1e-10)
            ),
            saveat=diffrax.SaveAt(t1=True),
        ),
    ),
    ids=("backward", "steps", "event"),
)
def test_saves(kind, options):
    p, every = _parameters(), ({}, dict(checkpoints=4))
    if "interval" in options:
        # As stiff in this direction.
        p["args"]["rate"] = -p["args"]["rate"]
    _check(p, kind, _adaptive, ours=every, **options)


@_slow
@pytest.mark.parametrize("kind", (diffrax.Kvaerno3, diffrax.KenCarp3))
def test_jumps(kind):
    controller = lambda: diffrax.ClipStepSizeController(_adaptive(), jump_ts=[0.4])
    _check(_parameters(), kind, controller, ours=({}, dict(checkpoints=3)))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=() if x is diffrax.Kvaerno3 else _slow) for x in _KINDS],
)
def test_finite_differences(kind):
    """And forward mode over reverse mode."""
    adjoint, p = SymplecticAdjoint(), _parameters()
    f = jit(lambda p: _loss(p, kind, adjoint, _constant))
    direction = normal_like(p, 3)
    true = directional_difference(f, p, direction, 1e-3)
    grad = jax.grad(lambda p: _loss(p, kind, adjoint, _constant))
    found, tangent = jit(lambda p: jax.jvp(grad, (p,), (direction,)))(p)
    inner = lambda x, y: sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))
    assert abs(inner(found, direction) - true) < 1e-5 * abs(true)
    true = directional_difference(jit(grad), p, direction, 1e-3)
    assert leaf_differences(tangent, true) < 1e-5


@pytest.mark.parametrize(
    "kind, controller, keywords",
    (
        (diffrax.Kvaerno3, _adaptive, {}),
        pytest.param(diffrax.Kvaerno4, _constant, dict(checkpoints=4), marks=_slow),
        pytest.param(diffrax.Kvaerno5, _adaptive, dict(keep="stages"), marks=_slow),
        pytest.param(diffrax.KenCarp3, _adaptive, dict(keep="stages"), marks=_slow),
        pytest.param(diffrax.KenCarp4, _adaptive, dict(checkpoints=4), marks=_slow),
        pytest.param(diffrax.KenCarp5, _constant, {}, marks=_slow),
        pytest.param(diffrax.ImplicitEuler, _adaptive, {}, marks=_slow),
        pytest.param(diffrax.Sil3, _adaptive, {}, marks=_slow),
        pytest.param(_SDIRK2, _adaptive, {}, marks=_slow),
    ),
)
def test_batch(kind, controller, keywords):
    """Elements of different lengths, which share all parameters but one."""
    p = _parameters()
    along = lambda s: jax.tree.map(lambda x: x + s, p["y0"])
    y0s = jax.vmap(along)(jnp.linspace(0.0, 2.0, 3))

    def loss(shared, y0s, adjoint):
        one = lambda y0: _loss(shared | dict(y0=y0), kind, adjoint, controller)
        return jnp.sum(jax.vmap(one)(y0s))

    shared = {k: v for k, v in p.items() if k != "y0"}

    def found(adjoint):
        f = lambda shared, y0s: loss(shared, y0s, adjoint)
        value, grad = jit(jax.value_and_grad(f, (0, 1)))(shared, y0s)
        return value, grad

    true = found(diffrax.RecursiveCheckpointAdjoint())
    check(found(SymplecticAdjoint(**keywords)), true, tolerance=1e-8)


@_slow
@pytest.mark.filterwarnings("ignore:Complex:UserWarning")
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.complex128))
def test_dtypes(dtype):
    """A vector field that is not holomorphic. Of a complex state diffrax pulls a root back
    as if it were: the reference has the real and the imaginary part instead."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    real = jnp.finfo(dtype).dtype
    tol = 1e3 * float(jnp.finfo(real).eps)

    def field(t, y, a):
        return -a.astype(y.dtype) * (y - jnp.conj(y[::-1]) * y)

    def field_of_parts(t, parts, a):
        found = field(t, lax.complex(*parts), a)
        return jnp.real(found), jnp.imag(found)

    def grad(field, y0, adjoint):
        def loss(y0, rate):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Kvaerno3(root_finder=optx.Newton(rtol=tol, atol=tol)),
                # Newton's method converges linearly, so steps are short.
                *jnp.array([0.0, 0.2, 0.02], rate.dtype),
                y0,
                rate,
                adjoint=adjoint,
                max_steps=16,
            )
            leaves = jax.tree.leaves(solution.ys)
            return sum(jnp.sum(jnp.abs(x) ** 2) for x in leaves)

        return jit(jax.grad(loss, (0, 1)))(y0, jnp.array(3.0, real))

    y0 = jnp.array([0.3 - 0.2j, 0.5 + 0.4j])
    y0 = (y0 if is_complex else y0.real).astype(dtype)
    found = grad(field, y0, SymplecticAdjoint())
    recursive = diffrax.RecursiveCheckpointAdjoint()
    if is_complex:
        parts, rate = grad(field_of_parts, (y0.real, y0.imag), recursive)
        # As JAX has gradients of complex numbers.
        true = jnp.conj(lax.complex(*parts)), rate
    else:
        true = grad(field, y0, recursive)
    assert leaf_differences(found, true) < (1e-4 if dtype == jnp.float32 else 1e-8)


#
# Linear solvers
#


def _diffusion(adjoint, couples=True):
    def field(t, y, a):
        inside = jnp.pad(y, 1)
        second = inside[2:] - 2 * y + inside[:-2] if couples else -y
        return a * second + y - y**3

    def loss(y0, a):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            _solver(diffrax.Kvaerno3),
            *(0.0, 1.0, 0.2),
            y0,
            a,
            adjoint=adjoint,
            max_steps=8,
        )
        return weigh(solution.ys)

    y0 = jnp.sin(jnp.linspace(0.3, 5.0, 6))
    return jit(jax.grad(loss, (0, 1)))(y0, jnp.array(30.0))


@_slow
@pytest.mark.parametrize(
    "keywords",
    (
        dict(linear_solver=lx.GMRES(rtol=1e-13, atol=1e-13)),
        dict(linear_solver=lx.QR()),
        dict(linear_tags=frozenset({lx.tridiagonal_tag})),
        dict(
            linear_solver=lx.CG(1e-13, 1e-13),
            linear_tags=frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag}),
        ),
        dict(couples=False, linear_tags=frozenset({lx.diagonal_tag})),
    ),
)
def test_linear_solvers(keywords):
    couples = dict(couples=keywords.get("couples", True))
    keywords = {k: v for k, v in keywords.items() if k != "couples"}
    true = _diffusion(diffrax.RecursiveCheckpointAdjoint(), **couples)
    found = _diffusion(SymplecticAdjoint(**keywords), **couples)
    assert leaf_differences(found, true) < 1e-8


#
# Memory
#


@_slow
def test_memory():
    """That of the systems of one stage, whatever the number of steps and stages."""
    sizes = (64, 128, 128, 64)
    weights = [jnp.ones((b, a)) for a, b in zip(sizes, sizes[1:])]

    def field(t, y, weights):
        for w in weights[:-1]:
            y = jnp.tanh(w @ y)
        return weights[-1] @ y

    def memory(kind, adjoint, steps):
        def loss(weights, y0):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                kind(root_finder=diffrax.VeryChord(rtol=1e-8, atol=1e-8)),
                *(0.0, 1.0, 1 / steps),
                y0,
                weights,
                adjoint=adjoint,
                max_steps=steps,
            )
            return jnp.sum(solution.ys)

        is_alone = isinstance(adjoint, diffrax.ForwardMode)
        f = loss if is_alone else jax.grad(loss, (0, 1))
        lowered = jax.jit(f).lower(weights, jnp.ones(64))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    ours = SymplecticAdjoint(checkpoints=8)
    few, many = memory(diffrax.Kvaerno3, ours, 16), memory(diffrax.Kvaerno5, ours, 512)
    state = 8 * 64
    # Twice three more stages, and where to keep the times of steps.
    assert many - few < 20 * state
    # The solve alone has the evaluation along each component of the state, the matrix and
    # its factors, too.
    alone, matrix = memory(diffrax.Kvaerno5, diffrax.ForwardMode(), 512), 64 * state
    print(f"{many} bytes, {alone} by the solve alone, {matrix} by a matrix")
    assert many < alone + 5 * matrix
    theirs = memory(diffrax.Kvaerno5, diffrax.RecursiveCheckpointAdjoint(), 512)
    assert many < theirs / 2


#
# Failure
#


def _is_nan(tree):
    return all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(tree))


def test_linear_solver_fails():
    """As if it were not done."""
    gmres = lx.GMRES(rtol=1e-13, atol=1e-13, max_steps=1, restart=1)
    assert _is_nan(_diffusion(SymplecticAdjoint(linear_solver=gmres)))


def _growth(rate, y0, adjoint, kind=diffrax.Kvaerno3, **options):
    """A stage is singular where the product of the rate, the length of a step and the
    diagonal of the tableau is one."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, a: a * y - jnp.sin(y)[::-1] ** 3),
        kind(
            root_finder=optx.Newton(rtol=1e-10, atol=1e-10),
            root_find_max_steps=options.pop("root_find_max_steps", 20),
        ),
        *(0.0, 1.0, 0.25),
        y0,
        rate,
        adjoint=adjoint,
        max_steps=8,
        **options,
    )


_failing = dict(root_find_max_steps=2)


@pytest.mark.parametrize(
    "kind, keywords",
    (
        (diffrax.Kvaerno3, {}),
        (diffrax.ImplicitEuler, {}),
        pytest.param(diffrax.Kvaerno3, dict(keep="stages"), marks=_slow),
        pytest.param(diffrax.Kvaerno3, dict(checkpoints=1), marks=_slow),
        pytest.param(diffrax.ImplicitEuler, dict(checkpoints=1), marks=_slow),
    ),
)
def test_root_finder_fails(kind, keywords):
    """That it does not converge is known, where the solve itself goes on."""
    adjoint, y0 = SymplecticAdjoint(**keywords), jnp.array([1.0, 2.0])

    def loss(rate, y0, throw):
        options = dict(kind=kind, throw=throw, **_failing)
        return jnp.sum(_growth(rate, y0, adjoint, **options).ys)

    def grad(throw):
        f = jax.value_and_grad(lambda *x: loss(*x, throw), (0, 1))
        return eqx.filter_jit(f)(-3.0, y0)

    value, found = grad(False)
    assert jnp.isfinite(value) and _is_nan(found)
    with pytest.raises(eqx.EquinoxRuntimeError, match="nonlinear solver"):
        jax.block_until_ready(grad(True))


def test_singular():
    adjoint, y0 = SymplecticAdjoint(), jnp.array([1.0, 0.0])

    def loss(rate, y0):
        options = dict(kind=diffrax.ImplicitEuler, throw=False)
        return jnp.sum(_growth(rate, y0, adjoint, **options).ys)

    # Of the step's length.
    assert _is_nan(jit(jax.grad(loss, (0, 1)))(4.0, y0))


@pytest.mark.parametrize("keep", ("states", pytest.param("stages", marks=_slow)))
def test_masked_failure(keep):
    """An element that failed, and that the loss leaves out, does no harm; one that it
    does not leave out does."""
    adjoint = SymplecticAdjoint(keep=keep)
    y0s = jnp.array([[1e-9, 2e-9], [1.0, 2.0]])

    def loss(rate, y0s, masks):
        def one(y0):
            solution = _growth(rate, y0, adjoint, throw=False, **_failing)
            okay = diffrax.is_successful(solution.result)
            okay = okay if masks else True
            return jnp.where(okay, jnp.sum(solution.ys), 0), okay

        values, okay = jax.vmap(one)(y0s)
        return jnp.sum(values), okay

    grad = lambda masks: jit(
        lambda *x: jax.grad(lambda *x: loss(*x, masks), (0, 1), has_aux=True)(*x)
    )
    (rate, y0), okay = grad(True)(-3.0, y0s)
    assert okay.tolist() == [True, False]
    (alone, _), _ = grad(True)(-3.0, y0s[:1])
    assert abs(rate - alone) < 1e-12 * abs(alone)
    assert jnp.all(y0[1] == 0) and jnp.all(jnp.isfinite(y0[0]))
    (rate, y0), _ = grad(False)(-3.0, y0s)
    assert jnp.isnan(rate) and jnp.all(jnp.isnan(y0[1]))


#
# Refused
#


@pytest.mark.parametrize("kind", (diffrax.ImplicitEuler, diffrax.KenCarp4))
def test_refuses_residuals(kind):
    with pytest.raises(NotImplementedError, match='keep="stages"'):
        _loss(_parameters(), kind, SymplecticAdjoint(keep="residuals"), _constant)


@pytest.mark.filterwarnings("ignore:Complex:UserWarning")
@pytest.mark.parametrize(
    "name, value",
    (
        ("linear_solver", lx.LU()),
        ("linear_tags", frozenset({lx.tridiagonal_tag})),
    ),
)
def test_refuses_linear_options(name, value):
    """Where they would do nothing."""

    def solve(y0, solver):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            *(solver, 0.0, 1.0, 0.1, y0),
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=SymplecticAdjoint(**{name: value}),
        ).ys

    with pytest.raises(ValueError, match=rf"`SymplecticAdjoint\({name}=.*is explicit"):
        solve(jnp.ones(2), diffrax.Tsit5())
    if name == "linear_tags":
        implicit = diffrax.ImplicitEuler(root_finder=optx.Newton(1e-12, 1e-12))
        real = lambda y0: jnp.real(jnp.sum(solve(y0, implicit)))
        with pytest.raises(ValueError, match="does not support a complex state"):
            jax.grad(real)(jnp.ones(2, complex))
