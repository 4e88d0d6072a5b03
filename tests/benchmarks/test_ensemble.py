"""A vmapped ensemble of small systems, against diffrax and against gradsolve."""

import pytest

from .ensemble import DIFFRAX, measure, RECORDED, REPLAY, SYMPLECTIC, table


pytestmark = [
    pytest.mark.benchmark,
    # What gradsolve warns of is no concern of ours.
    pytest.mark.filterwarnings("default"),
]


# How many times the replay alone: of few systems the loops themselves take the time.
@pytest.mark.parametrize("n, of_replay", ((128, 2.5), (4096, 1.5)))
def test_gradient(n, of_replay):
    """At default arguments, with adaptive steps and room for 4,096 of them."""
    rows = measure(n, 1e-6)
    print(table(list(rows.values())))
    ours, theirs = rows[SYMPLECTIC], rows[DIFFRAX]
    assert ours.memory < theirs.memory
    assert ours.seconds < theirs.seconds
    assert ours.seconds < rows[RECORDED].seconds
    assert ours.seconds < of_replay * rows[REPLAY].seconds
    assert ours.error < 1e-4
