import inspect

import diffrax_reversible

from .solver_table import PAGE, SOLVERS, with_table


def test_page_is_up_to_date():
    text = PAGE.read_text()
    assert with_table(text) == text, "run `python -m tests.solver_table`"


def test_no_composition_is_missing():
    base = diffrax_reversible.AbstractALFComposition
    named = {
        cls
        for cls in vars(diffrax_reversible).values()
        if inspect.isclass(cls) and issubclass(cls, base)
    }
    assert named - {base, diffrax_reversible.ALFComposition} <= set(SOLVERS)
