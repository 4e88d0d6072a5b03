import inspect

import diffrax_reversible

from .readme_table import README, SOLVERS, with_table


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
