"""The rules by which `diffrax.citation` finds the references of this package.

The BibTeX is that of the docstrings.
"""

import inspect
import re

import diffrax

from ._adjoint import InterpolatedAdjoint, ReversibleAdjoint, SymplecticAdjoint
from ._solver import (
    AbstractALFComposition,
    ALF,
    EES25,
    EES27,
    Reversible,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
    StormerVerlet,
    SymplecticComposition4,
    SymplecticComposition6,
    SymplecticComposition8,
)


# Whose docstring has the reference of the coefficients.
_coefficients = {
    ReversibleALF6: ReversibleALF6,
    ReversibleALF8: ReversibleALF8,
    ReversibleYoshida4: ReversibleYoshida4,
    ReversibleYoshida6: ReversibleYoshida4,
    ReversibleYoshida8: ReversibleYoshida8,
    SymplecticComposition4: ReversibleALF6,
    SymplecticComposition6: ReversibleALF6,
    SymplecticComposition8: ReversibleYoshida8,
}


def _references(cls: type) -> list[str]:
    found = re.findall(r"```bibtex([^`]*)```", inspect.getdoc(cls) or "")
    return [inspect.cleandoc(reference) for reference in found]


def _cite(what: str, source: type) -> str:
    (reference,) = _references(source)
    return f"% {what}\n{reference}"


@diffrax.citation_rules.append
def _alf(solver=None):
    if isinstance(solver, ALF):
        mali, leapfrog = _references(ALF)
        return f"""
% The solver, with its damping, is from:
{mali}
% The asynchronous leapfrog method is from:
{leapfrog}
"""
    if isinstance(solver, AbstractALFComposition):
        mali, leapfrog = _references(ALF)
        (composition,) = _references(AbstractALFComposition)
        return f"""
% The asynchronous leapfrog method, of which the solver's step is composed, is from:
{leapfrog}
% and was introduced for neural ODEs in:
{mali}
% Its reversible compositions of higher order, with adaptive steps, are from:
{composition}
"""


@diffrax.citation_rules.append
def _coefficients_of(solver=None):
    if (source := _coefficients.get(type(solver))) is not None:
        return _cite("The coefficients of the solver's step are from:", source)


@diffrax.citation_rules.append
def _others(solver=None):
    if isinstance(solver, Reversible):
        what = "The coupling that makes the Runge-Kutta solver reversible is from:"
        return _cite(what, Reversible)
    if isinstance(solver, EES25 | EES27):
        return _cite("The explicit and effectively symmetric scheme is from:", EES25)
    if isinstance(solver, StormerVerlet):
        return _cite("The Stormer-Verlet method is described in:", StormerVerlet)


@diffrax.citation_rules.append
def _reversible_adjoint(solver=None, adjoint=None):
    if isinstance(adjoint, ReversibleAdjoint):
        mali, _ = _references(ALF)
        (composition,) = _references(AbstractALFComposition)
        # An entry printed twice would be an error in BibTeX.
        has_mali = isinstance(solver, ALF | AbstractALFComposition)
        has_composition = isinstance(solver, AbstractALFComposition)
        return f"""
% Gradients in constant memory, by reversing the accepted steps of the solver, are from:
{"% zhuang2021mali, see above," if has_mali else mali}
% and, for solvers of higher order:
{"% maslovskaya2024adaptive, see above." if has_composition else composition}
"""


@diffrax.citation_rules.append
def _other_adjoints(adjoint=None):
    if isinstance(adjoint, SymplecticAdjoint):
        what = "Exact gradients, one stage of a step at a time, are from:"
        return _cite(what, SymplecticAdjoint)
    if isinstance(adjoint, InterpolatedAdjoint):
        what = "Gradients from the adjoint equation, along an interpolated solution"
        return _cite(f"{what}, are from:", InterpolatedAdjoint)
