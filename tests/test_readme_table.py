import inspect

import diffrax
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible

from .readme_table import evaluations, README, SOLVERS, with_table


def test_readme_is_up_to_date():
    text = README.read_text()
    assert with_table(text) == text, "run `python -m tests.readme_table`"


def test_no_composition_is_missing():
    base = diffrax_reversible.AbstractALFComposition
    named = {
        cls
        for cls in vars(diffrax_reversible).values()
        if inspect.isclass(cls) and issubclass(cls, base)
    }
    assert named - {base, diffrax_reversible.ALFComposition} <= set(SOLVERS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations(solver):
    """The table's number is that of the calls of the vector field."""
    calls = []

    def vector_field(t, y, args):
        del t, args
        calls.append(y)
        return -y

    solver = solver()
    term = diffrax.ODETerm(vector_field)
    with jax.disable_jit():
        solver.step(term, 0.0, 0.1, jnp.array(1.0), None, jnp.array(-1.0), False)
    assert len(calls) == evaluations(solver)
