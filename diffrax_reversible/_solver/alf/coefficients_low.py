"""Compositions of asynchronous-leapfrog steps: the coefficients of orders 2 and 4.

Each list was verified: the order of the fractions in both `z` and `v`, the order of the
error estimate and of the interpolant. The scales of the estimates were chosen such that
with `PIDController(rtol=tol, atol=tol)` the global error stays below three times that
of `diffrax.Tsit5` for `tol` from 1e-3 to 1e-9 on a pendulum, an ellipse of Kepler's,
Lotka and Volterra's equations and a forced van der Pol oscillator.
"""

from .composition import Composition, numbers


ALF2 = Composition(
    order=2,
    fractions=numbers("0.5 0.5"),
    error_weights=numbers("-1 1"),
    error_order=2,
    error_scale=2.0,
    source=(
        "Maslovskaya et al. 2024, Theorem 3.1: two asynchronous-leapfrog half steps"
    ),
)


ALF4 = Composition(
    order=4,
    fractions=numbers("""
        0.2683300957817599 0.65133142723564 -0.8393230460347997 0.65133142723564
        0.2683300957817599
    """),
    error_weights=numbers("""
        -0.05903077003933288 -0.22974980553122767 0.0 0.22974980553122767
        0.05903077003933288
    """),
    error_order=4,
    error_scale=16.0,
    source=(
        "derived for this project: palindromic list of single ALF fractions "
        "with sum g = 1, sum g^3 = 0, sum (-1)^i g_i^2 = 0 (the last makes v, "
        "too, of order 4)"
    ),
    interpolant=(
        numbers("""
            0.7228669466497406 0.15373020245451788 0.0 -0.15373020245451788
            -0.7228669466497406
        """),
        numbers("""
            -0.7316699042182401 1.6513314272356399 -1.8393230460347998
            1.6513314272356399 -0.7316699042182401
        """),
        numbers("""
            0.278401761743478 1.0835493180505038 0.0 -1.0835493180505038
            -0.278401761743478
        """),
    ),
    interpolant_order=4,
)


YOSHIDA4 = Composition(
    order=4,
    fractions=numbers("""
        0.6756035959798288 0.6756035959798288 -0.8512071919596577 -0.8512071919596577
        0.6756035959798288 0.6756035959798288
    """),
    error_weights=numbers("""
        -0.3694087656030346 0.3694087656030346 -0.5863998631245312 0.5863998631245312
        -0.3694087656030346 0.3694087656030346
    """),
    error_order=4,
    error_scale=5.0,
    source="Yoshida 1990 triple jump applied to alf2 (Maslovskaya et al. 2024: Y4)",
)


BLANES_MOAN4 = Composition(
    order=4,
    fractions=numbers("""
        0.07920369643119568 0.13031141018216638 0.22286149586760765 -0.3667132690474257
        0.3246481886897062 0.10968847787674982 0.10968847787674982 0.3246481886897062
        -0.3667132690474257 0.22286149586760765 0.13031141018216638 0.07920369643119568
    """),
    error_weights=numbers("""
        0.07290461255937455 -0.1789361605677446 0.04975230629427539 0.020654762079863824
        -0.018182827429022812 0.38154385734112245 -0.38154385734112245
        0.018182827429022812 -0.020654762079863824 -0.04975230629427539
        0.1789361605677446 -0.07290461255937455
    """),
    error_order=4,
    source="Blanes & Moan 2002, Table 2, S6, read as an ALF list",
    interpolant=(
        numbers("""
            0.1500425160759929 0.27689822339964687 0.4515387209015238
            -0.7489376018344713 0.6644958895547387 0.1606681128393551
            -0.1606681128393551 -0.6644958895547387 0.7489376018344713
            -0.4515387209015238 -0.27689822339964687 -0.1500425160759929
        """),
        numbers("""
            -0.1617319738054861 -0.29911527387432024 -0.3397584082678996
            0.3888196195027137 -0.3670932052944917 0.778879241739484 0.778879241739484
            -0.3670932052944917 0.3888196195027137 -0.3397584082678996
            -0.29911527387432024 -0.1617319738054861
        """),
        numbers("""
            0.6475963705082238 -0.8166548411763436 0.41178538820216537
            -0.28625130733328114 0.36132769600930414 -1.9672212108537912
            1.9672212108537912 -0.36132769600930414 0.28625130733328114
            -0.41178538820216537 0.8166548411763436 -0.6475963705082238
        """),
        numbers("""
            -0.7137386421499843 1.4430425861922074 -0.8124229318653419
            0.6077422776995556 -0.5900767850173191 0.06545349514088238
            0.06545349514088238 -0.5900767850173191 0.6077422776995556
            -0.8124229318653419 1.4430425861922074 -0.7137386421499843
        """),
    ),
    interpolant_order=5,
)
