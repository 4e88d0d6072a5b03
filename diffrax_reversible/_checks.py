"""Checks of arguments that are the same everywhere."""

import inspect
from typing import Any

import numpy as np


def check_integer(
    name: str, argument: str, value: Any, least: int = 1, *or_else: Any
) -> None:
    """Raises `ValueError` unless `name(argument=value)` is an integer that is at least
    `least`, or one of `or_else`."""
    # `True == 1`, and is not meant.
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    is_other = any(type(value) is type(x) and value == x for x in or_else)
    if is_integer and value >= least or is_other:
        return
    others = [f'"{x}"' if isinstance(x, str) else f"`{x}`" for x in or_else]
    must_be = " or ".join([f"an integer that is at least {least}", *others])
    raise ValueError(f"`{name}({argument}=...)` must be {must_be}; got {value!r}.")


def required_arguments(kind: type) -> list[str]:
    """The names of the arguments without which `kind` cannot be made."""
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def written(solver: Any) -> str:
    """How a user writes a solver, or one of a class of solvers."""
    kind = solver if isinstance(solver, type) else type(solver)
    package = kind.__module__.partition(".")[0]
    name = f"diffrax.{kind.__name__}" if package == "diffrax" else kind.__name__
    return f"{name}(...)" if required_arguments(kind) else f"{name}()"
