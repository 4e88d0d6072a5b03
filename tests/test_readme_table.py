import inspect

import diffrax
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible

from .measure import Counter
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
    counter = Counter()
    solver = solver()
    term = diffrax.ODETerm(counter.field())
    y0, v0 = jnp.array(1.0), jnp.array(-1.0)
    jax.jit(lambda: solver.step(term, 0.0, 0.1, y0, y0, v0, False)[0])()
    jax.effects_barrier()
    assert counter.evaluations == evaluations(solver)
