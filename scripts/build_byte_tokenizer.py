#!/usr/bin/env python
"""The byte tokenizer, written anew: ``python -m torchtitan.experiments.lighthouse.data.build_byte_tokenizer``."""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "torchtitan/experiments/lighthouse"

# By its path: by its name, Python would first import all of upstream's package, which --help need not wait for.
runpy.run_path(str(PACKAGE / "data/build_byte_tokenizer.py"), run_name="__main__")
