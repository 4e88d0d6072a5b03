"""A user who changes nothing but `adjoint=` gets the same gradient, in no more time and no
more memory."""

import diffrax
import jax.numpy as jnp
import pytest

from .diffrax_examples import EXAMPLES
from .diffrax_examples_table import measure


pytestmark = pytest.mark.benchmark


def _name(x):
    return f"{x.name}, {type(x.solver).__name__}"


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("example", EXAMPLES, ids=_name)
def test_default_arguments(benchmark, example, dtype):
    found = measure(example, dtype)
    print(found)
