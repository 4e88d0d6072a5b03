"""References for `diffrax.citation`."""

import diffrax

from ._adjoint.interpolated.adjoint import InterpolatedAdjoint
from ._adjoint.reversible.adjoint import ReversibleAdjoint
from ._adjoint.symplectic.adjoint import SymplecticAdjoint
from ._solver.alf.base import AbstractALFComposition
from ._solver.alf.mali import ALF
from ._solver.alf.named import (
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
)
from ._solver.runge_kutta.coupling import Reversible
from ._solver.runge_kutta.ees import EES25, EES27
from ._solver.symplectic.composition import SymplecticComposition


_maslovskaya2024 = r"""
@misc{maslovskaya2024adaptive,
    title={Adaptive higher order reversible integrators for memory efficient deep
           learning},
    author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen, Christian and
            Singh, Pranav and Wembe, Boris},
    year={2024},
    eprint={2410.09537},
    archivePrefix={arXiv}
}
"""

_zhuang2021 = r"""
@inproceedings{zhuang2021mali,
    title={{MALI}: A memory efficient and reverse accurate integrator for Neural
           {ODE}s},
    author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
            Duncan, James S.},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://openreview.net/forum?id=blfSjHeFM_e}
}
"""

_mutze2013 = r"""
@misc{mutze2013asynchronous,
    title={An asynchronous leapfrog method {II}},
    author={Mutze, Ulrich},
    year={2013},
    eprint={1311.6602},
    archivePrefix={arXiv}
}
"""

_yoshida1990 = r"""
@article{yoshida1990construction,
    title={Construction of higher order symplectic integrators},
    author={Yoshida, Haruo},
    journal={Physics Letters A},
    volume={150},
    number={5--7},
    pages={262--268},
    year={1990}
}
"""

_blanes2002 = r"""
@article{blanes2002practical,
    title={Practical symplectic partitioned {R}unge--{K}utta and
           {R}unge--{K}utta--{N}ystr{\"o}m methods},
    author={Blanes, Sergio and Moan, Per Christian},
    journal={Journal of Computational and Applied Mathematics},
    volume={142},
    number={2},
    pages={313--330},
    year={2002}
}
"""

_sofroniou2005 = r"""
@article{sofroniou2005derivation,
    title={Derivation of symmetric composition constants for symmetric integrators},
    author={Sofroniou, Mark and Spaletta, Giulia},
    journal={Optimization Methods and Software},
    volume={20},
    number={4--5},
    pages={597--613},
    year={2005}
}
"""

_kahan1997 = r"""
@article{kahan1997composition,
    title={Composition constants for raising the orders of unconventional schemes for
           ordinary differential equations},
    author={Kahan, William and Li, Ren-Cang},
    journal={Mathematics of Computation},
    volume={66},
    number={219},
    pages={1089--1099},
    year={1997}
}
"""

_mccallum2024 = r"""
@misc{mccallum2024efficient,
    title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
    author={McCallum, Sam and Foster, James},
    year={2024},
    eprint={2410.11648},
    archivePrefix={arXiv}
}
"""

_matsubara2021 = r"""
@inproceedings{matsubara2021symplectic,
    title={Symplectic Adjoint Method for Exact Gradient of Neural {ODE} with Minimal
           Memory},
    author={Matsubara, Takashi and Miyatake, Yuto and Yaguchi, Takaharu},
    booktitle={Advances in Neural Information Processing Systems},
    volume={34},
    year={2021}
}
"""

_daulbaev2020 = r"""
@inproceedings{daulbaev2020interpolation,
    title={Interpolation technique to speed up gradients propagation in neural {ODE}s},
    author={Daulbaev, Talgat and Katrutsa, Alexandr and Markeeva, Larisa and Gusak, Julia
            and Cichocki, Andrzej and Oseledets, Ivan},
    booktitle={Advances in Neural Information Processing Systems},
    volume={33},
    year={2020}
}
"""

_shmelev2025 = r"""
@misc{shmelev2025explicit,
    title={Explicit and Effectively Symmetric Schemes for Neural {SDE}s},
    author={Shmelev, Daniil and Salvi, Cristopher},
    year={2025},
    eprint={2509.20599},
    archivePrefix={arXiv}
}
"""


@diffrax.citation_rules.append
def _mali(solver=None):
    if isinstance(solver, ALF):
        return rf"""
% The solver, with its damping, is from:
{_zhuang2021.strip()}
% The asynchronous leapfrog method is from:
{_mutze2013.strip()}
"""


@diffrax.citation_rules.append
def _alf(solver=None):
    if isinstance(solver, AbstractALFComposition):
        return rf"""
% The asynchronous leapfrog method, of which the solver's step is composed, is from:
{_mutze2013.strip()}
% and was introduced for neural ODEs in:
{_zhuang2021.strip()}
% Its reversible compositions of higher order, with adaptive steps, are from:
{_maslovskaya2024.strip()}
"""


_fractions = {
    ReversibleYoshida4: _yoshida1990,
    ReversibleYoshida6: _yoshida1990,
    ReversibleYoshida8: _kahan1997,
    ReversibleALF6: _blanes2002,
    ReversibleALF8: _sofroniou2005,
}


@diffrax.citation_rules.append
def _composition(solver=None):
    reference = _fractions.get(type(solver))
    if reference is not None:
        return rf"""
% The fractions of the solver's step are from:
{reference.strip()}
"""


@diffrax.citation_rules.append
def _coupling(solver=None):
    if isinstance(solver, Reversible):
        return rf"""
% The coupling that makes the Runge-Kutta solver reversible is from:
{_mccallum2024.strip()}
"""


@diffrax.citation_rules.append
def _ees(solver=None):
    if isinstance(solver, EES25 | EES27):
        return rf"""
% The explicit and effectively symmetric scheme is from:
{_shmelev2025.strip()}
"""


@diffrax.citation_rules.append
def _symplectic(solver=None):
    if isinstance(solver, SymplecticComposition) and solver.order(None) > 2:
        source = _kahan1997 if solver.order(None) == 8 else _blanes2002
        return rf"""
% The coefficients of the symplectic composition are from:
{source.strip()}
"""


@diffrax.citation_rules.append
def _reversible_adjoint(solver=None, adjoint=None):
    if isinstance(adjoint, ReversibleAdjoint):
        # An entry printed twice would be an error in BibTeX.
        if isinstance(solver, ALF):
            return rf"""
% Gradients in constant memory, by reversing the accepted steps of the solver, are from
% zhuang2021mali, see above, and, for solvers of higher order:
{_maslovskaya2024.strip()}
"""
        if isinstance(solver, AbstractALFComposition):
            return r"""
% Gradients in constant memory, by reversing the accepted steps of the solver, are from
% zhuang2021mali and, for solvers of higher order, maslovskaya2024adaptive, see above.
"""
        return rf"""
% Gradients in constant memory, by reversing the accepted steps of the solver, are from:
{_zhuang2021.strip()}
% and, for solvers of higher order:
{_maslovskaya2024.strip()}
"""


@diffrax.citation_rules.append
def _symplectic_adjoint(adjoint=None):
    if isinstance(adjoint, SymplecticAdjoint):
        return rf"""
% Exact gradients, one stage of a step at a time, are from:
{_matsubara2021.strip()}
"""


@diffrax.citation_rules.append
def _interpolated_adjoint(adjoint=None):
    if isinstance(adjoint, InterpolatedAdjoint):
        return rf"""
% Gradients from the adjoint equation, along an interpolated solution, are from:
{_daulbaev2020.strip()}
"""
