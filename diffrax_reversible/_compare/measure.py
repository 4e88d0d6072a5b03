"""What compiled functions cost."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def in_turn(fns: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """The times of each, in seconds, taken in turn, so that a disturbance meets all
    alike. Each is called once before."""
    for fn in fns:
        jax.block_until_ready(fn())
    times = [[] for _ in fns]
    for _ in range(repeats):
        for fn, found in zip(fns, times):
            start = time.perf_counter()
            jax.block_until_ready(fn())
            found.append(time.perf_counter() - start)
    return times


def temp_bytes(compiled: Any) -> int | None:
    """Temporary memory of a compiled function, `None` where the backend does not tell."""
    try:
        analysis = compiled.memory_analysis()
    except NotImplementedError:
        return None
    # A backend that does not know gives `None`, or an object without this figure.
    return getattr(analysis, "temp_size_in_bytes", None)
