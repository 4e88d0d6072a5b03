import re
from pathlib import Path

import jax
import pytest


_readme = Path(__file__).parents[1] / "README.md"
_blocks = re.findall(r"^```python\n(.*?)^```$", _readme.read_text(), re.M | re.S)


def test_has_examples():
    assert len(_blocks) > 0


@pytest.mark.parametrize("block", _blocks, ids=range(1, len(_blocks) + 1))
def test_example(block):
    # As a user runs it.
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(block, str(_readme), "exec"), {"__name__": "readme"})
