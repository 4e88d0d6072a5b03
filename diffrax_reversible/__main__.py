"""The main job: measure gradients, and train a neural ODE on real data."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from ._compat import enable_x64


_default_steps = 3000


def _positive_integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _make_folder(folder: Path, parser: argparse.ArgumentParser) -> None:
    if folder.exists() and not folder.is_dir():
        parser.error(f"argument --output: '{folder}' is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make '{folder}': {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"argument --output: '{folder}' is not writable")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffrax_reversible",
        description="Compare gradients of long solves with those of diffrax's default, "
        "train a neural ODE on the Hudson Bay lynx and hare pelts with `ReversibleALF4` "
        "and `ReversibleAdjoint`, and save a picture of both.",
    )
    parser.add_argument(
        "--steps",
        type=_positive_integer,
        default=_default_steps,
        metavar="N",
        help="number of training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("."),
        metavar="FOLDER",
        help="where to save the picture (default: the current folder)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the main job.

    **Arguments:**

    - `arguments`: the words of the command line. Defaults to those of this process.

    Ends the process, with a message, for arguments that make no sense and where the
    packages of the extra `examples` are missing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        from ._examples import data, long_solve, picture, training
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("matplotlib", "optax", "tqdm"):
            raise
        parser.exit(
            1,
            f"`python -m diffrax_reversible` needs {missing}, which is not "
            'installed. Install it with `pip install "diffrax_reversible[examples]"`.'
            "\n",
        )

    _make_folder(options.output, parser)

    # In double precision a difference between gradients tells methods that agree
    # up to rounding from methods that merely come close.
    with enable_x64(True):
        began = time.perf_counter()
        network = "-".join(map(str, long_solve.sizes))
        device = jax.devices()[0].device_kind
        print(
            f"1. What a gradient costs, with a network {network} (float64, {device})."
        )
        print("   Each program is compiled, which takes a few seconds, and then timed.")
        comparisons = long_solve.compare(long_solve.candidates)
        count, comparison = max(comparisons.items())
        print(f"\nOne gradient of a solve of {count:,} steps, at default arguments:")
        print(comparison)
        print()

        pelts = data.load_pelts()
        model = training.NeuralODE(pelts)
        before = training.loss(model, pelts)
        print("2. A neural ODE is trained on 21 years of lynx and hare pelts.")
        print(
            "   `years`: how many of them count so far. `loss`: the mean squared error"
        )
        print(
            "   over these, which rises when one more is added. The first step compiles."
        )
        model = training.train(model, pelts, options.steps)
        after = training.loss(model, pelts)
        print(f"loss before training: {before:.5f}")
        print(f"loss after training:  {after:.5f}")
        print()

        path = options.output / "lynx_hare.png"
        picture.save_picture(model, pelts, comparisons, path)
        print(f"Picture: {path}")
        print(f"Total time: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
