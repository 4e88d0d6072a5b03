"""A vmapped ensemble of small systems, against diffrax and against gradsolve."""

import pytest

from .ensemble import DIFFRAX, measure, RECORDED, REPLAY, SYMPLECTIC, table


pytestmark = [
    pytest.mark.benchmark,
    # What gradsolve warns of is no concern of ours.
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("n", (128, 4096))
def test_gradient(n):
    """At default arguments, with adaptive steps and room for 4,096 of them."""
    rows = measure(n, 1e-6)
    print(table(list(rows.values())))
    ours, theirs = rows[SYMPLECTIC], rows[DIFFRAX]
    assert ours.memory < theirs.memory
    assert ours.seconds < theirs.seconds
    assert ours.seconds < rows[RECORDED].seconds
    assert ours.seconds < 1.5 * rows[REPLAY].seconds
    assert ours.error < 1e-4
