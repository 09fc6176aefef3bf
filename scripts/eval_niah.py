#!/usr/bin/env python
"""The retrieval test: the command ``python -m torchtitan.experiments.lighthouse.eval_niah``, from the repository."""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "torchtitan/experiments/lighthouse"

# By its path: by its name, Python would first import all of upstream's package, which --help need not wait for.
runpy.run_path(str(PACKAGE / "eval_niah.py"), run_name="__main__")
