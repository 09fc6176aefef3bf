"""Random single-bit flips in a checkpoint: is every one of them found before it would be loaded?

    python tests/faults/flips.py                          # in a checkpoint of two steps of training, made for it
    python tests/faults/flips.py CHECKPOINT --flips 1000  # in a copy of that step-N folder

Half of the flips fall on any byte of the folder, and half on any file first, so that the small files get their share.
Exit status 0 if all were found, 1 if not.
"""

# ruff: noqa: E402  (run alone, it has to find the packages beside it first)

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from torchtitan.experiments.lighthouse.runs.checkpoints import damage_in

from helpers.checkpoints import flip, random_flip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a step-N folder (default: one is made)")
    parser.add_argument("--flips", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the flips (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint or trained(Path(scratch) / "run")
        copy = shutil.copytree(checkpoint, Path(scratch) / checkpoint.name)
        if what := damage_in(copy, "digest"):
            parser.error(f"{checkpoint} is damaged already: {what}")
        return report(copy, options.flips, options.seed)


def trained(folder: Path) -> Path:
    from helpers.launch import train

    train(folder, 2, training__steps="2")
    return folder / "checkpoint/step-2"


def report(checkpoint: Path, flips: int, seed: int) -> int:
    """Flip and look, print what was found in which file; the exit status."""
    draw, found, by_file, begin = random.Random(seed), 0, {}, time.monotonic()
    for number in range(flips):
        file, byte, bit = random_flip(checkpoint, draw)
        flip(file, byte, bit)
        detected = damage_in(checkpoint, "digest") is not None
        flip(file, byte, bit)
        found += detected
        hits, of = by_file.get(file.name, (0, 0))
        by_file[file.name] = hits + detected, of + 1
        if not detected:
            print(f"flip {number}: bit {bit} of byte {byte:,} of {file.name} was NOT found")
    assert damage_in(checkpoint, "digest") is None, "the flips were not undone"
    for name, (hits, of) in sorted(by_file.items()):
        print(f"{name}: {hits:,} of {of:,} found")
    print(f"{found:,} of {flips:,} flips found (seed {seed}, {time.monotonic() - begin:.0f} s)")
    return int(found != flips)


if __name__ == "__main__":
    sys.exit(main())
