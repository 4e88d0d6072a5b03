import functools as ft

import diffrax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from diffrax_reversible import (
    ALFComposition,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleYoshida8,
)
from diffrax_reversible._solver.alf import coefficients
from diffrax_reversible._solver.alf.coefficients import ALF4, BLANES_MOAN6


_half = (0.5, 0.5)
_tables = {name: x for name, x in vars(coefficients).items() if name.isupper()}


@pytest.mark.parametrize(
    "arguments, message",
    (
        (dict(fractions=(), order=2), "at least one fraction"),
        (dict(fractions=(0.5, 0.4), order=2), r"must sum to one.*sum to 0\.9"),
        (dict(fractions=(0.5, 0.5 + 1e-11), order=2), "must sum to one"),
        (dict(fractions=(0.2, 0.3, 0.5), order=2), "read the same backwards"),
        (dict(fractions=(0.5, float("nan")), order=2), "must be finite"),
        (dict(fractions=_half, order=3), "must be a positive even number"),
        (dict(fractions=_half, order=0), "must be a positive even number"),
        (dict(fractions=_half, order=2, error_weights=(-1, 1)), "give both"),
        (dict(fractions=_half, order=2, error_order=2), "give both"),
        (
            dict(fractions=_half, order=2, error_weights=(-1, 0, 1), error_order=2),
            "one weight for each of the 2 fractions",
        ),
        (
            dict(fractions=_half, order=2, error_weights=(-1, 2), error_order=2),
            "must sum to zero",
        ),
        (
            dict(fractions=_half, order=2, error_weights=(-1, 1), error_order=0),
            "must be a positive number",
        ),
        (
            dict(fractions=_half, order=2, error_weights=(-1, 1), error_order=3),
            "goes with the power 2 of the step",
        ),
        (dict(fractions=_half, order=2, interpolant=((1.0,),)), "one or more rows"),
        (dict(fractions=_half, order=2, interpolant=()), "one or more rows"),
        (
            dict(fractions=_half, order=2, interpolation="stages"),
            "Use `interpolation='hermite'`",
        ),
    ),
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=f"`ALFComposition\\(.*{message}"):
        ALFComposition(**arguments)


@pytest.mark.parametrize("name", _tables)
def test_order(name):
    """What each list says of itself is true, and it is not more than that."""
    table = _tables[name]
    estimate = dict(error_weights=table.error_weights, error_order=table.error_order)
    solver = ALFComposition(table.fractions, table.order, **estimate)
    assert solver.order(None) == table.order
    with pytest.raises(ValueError, match=f"order .* is {table.order}\\. Say"):
        ALFComposition(table.fractions, table.order + 2)
    if table.error_order is not None:
        estimate["error_order"] += 1
        with pytest.raises(ValueError, match=f"Say `error_order={table.error_order}`"):
            ALFComposition(table.fractions, table.order, **estimate)


def _symmetric(*half):
    """An odd list: these, what is left in the middle, and these backwards."""
    return (*half, 1 - 2 * sum(half), *half[::-1])


@pytest.mark.parametrize(
    "fractions, order",
    (
        ((1.0,), 2),
        (_symmetric(1 / (2 - 2 ** (1 / 3))), 4),
        (_symmetric(1 / (4 - 4 ** (1 / 3)), 1 / (4 - 4 ** (1 / 3))), 4),
        (_symmetric(1 / (2 - 2 ** (1 / 3)) + 1e-6), 2),
        ((0.25,) * 4, 2),
    ),
)
def test_order_of_odd_lists(fractions, order):
    """Of the solution: the solver state is of order 2 here."""
    assert ALFComposition(fractions, order).order(None) == order
    with pytest.raises(ValueError, match=rf"order .* is {order}\. Say"):
        ALFComposition(fractions, 10)


def test_named_refused():
    with pytest.raises(ValueError, match=r"`ReversibleALF2\(interpolation='stages'"):
        ReversibleALF2(interpolation="stages")


@pytest.mark.parametrize("make", (ReversibleALF2, ft.partial(ALFComposition, _half, 2)))
def test_unknown_interpolation(make):
    # Here in the tests, types are checked first.
    with pytest.raises((ValueError, TypeCheckError), match="interpolation"):
        make(interpolation="cubic")


@pytest.mark.parametrize(
    "named, table", ((ReversibleALF4(), ALF4), (ReversibleALF6(), BLANES_MOAN6))
)
def test_own_is_named(named, table):
    """The same list, given by hand; the estimate by its scale."""
    own = ALFComposition(
        list(table.fractions),
        table.order,
        error_weights=[table.error_scale * e for e in table.error_weights],
        error_order=table.error_order,
        interpolant=table.interpolant,
    )
    term = diffrax.ODETerm(lambda t, y, args: jnp.sin(y[::-1] + t))
    y0 = jnp.array([0.4, -0.9])
    v0 = named.init(term, 0.0, 0.1, y0, None)
    step = lambda solver: solver.step(term, 0.0, 0.1, y0, None, v0, False)
    for found, true in zip(step(own)[:2], step(named)[:2]):
        assert jnp.allclose(found, true, rtol=1e-14, atol=1e-18)
    assert own.interpolation_cls is named.interpolation_cls


@pytest.mark.parametrize(
    "solver", (ReversibleYoshida8(), ALFComposition(_half, 2)), ids=("Y8", "own")
)
@pytest.mark.parametrize("dt0", (None, 0.1))
def test_no_estimate(solver, dt0):
    with pytest.raises((ValueError, RuntimeError), match="error estimate"):
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            solver,
            0.0,
            1.0,
            dt0,
            jnp.array([1.0]),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        )
