#!/usr/bin/env python
"""Which layers look back? ``python -m torchtitan.experiments.lighthouse.look_back``, from the repository."""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "torchtitan/experiments/lighthouse"

# By its path: by its name, Python would first import all of upstream's package, which --help need not wait for.
runpy.run_path(str(PACKAGE / "look_back.py"), run_name="__main__")
