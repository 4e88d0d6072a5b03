"""References for `diffrax.citation`."""

import diffrax

from ._adjoint import ReversibleAdjoint
from ._solver import AbstractALFComposition, Reversible, ReversibleYoshida4


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


_mccallum2024 = r"""
@misc{mccallum2024efficient,
    title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
    author={McCallum, Sam and Foster, James},
    year={2024},
    eprint={2410.11648},
    archivePrefix={arXiv}
}
"""


@diffrax.citation_rules.append
def _coupling(solver=None):
    if isinstance(solver, Reversible):
        return rf"""
% The coupling that makes the Runge-Kutta solver reversible is from:
{_mccallum2024.strip()}
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


@diffrax.citation_rules.append
def _yoshida(solver=None):
    if isinstance(solver, ReversibleYoshida4):
        return rf"""
% The fractions of the solver's step (the "triple jump") are from:
{_yoshida1990.strip()}
"""


@diffrax.citation_rules.append
def _reversible_adjoint(solver=None, adjoint=None):
    if isinstance(adjoint, ReversibleAdjoint):
        # An entry printed twice would be an error in BibTeX.
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
