#!/usr/bin/env python
"""The next stage: the command ``python -m torchtitan.experiments.lighthouse.resume_dense``, from the repository."""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "torchtitan/experiments/lighthouse"

# By its path: by its name, Python would first import all of upstream's package, which --help need not wait for.
runpy.run_path(str(PACKAGE / "resume_dense.py"), run_name="__main__")
