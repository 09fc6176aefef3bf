#!/usr/bin/env python
"""What a run will cost: the command ``python -m torchtitan.experiments.lighthouse.plan``, from the repository."""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "torchtitan/experiments/lighthouse"

# By its path: by its name, Python would first import all of upstream's package, which --help need not wait for.
runpy.run_path(str(PACKAGE / "plan.py"), run_name="__main__")
