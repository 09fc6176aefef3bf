"""Upstream's metrics where they have no hook: which process logs, and how the console's lines of a step begin."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.tools.logging import logger

#: How upstream's lines of a step and of its validation begin, after the code of a colour where there are colours.
_STEP = re.compile(r"^(?P<colour>(?:\x1b\[[\d;]*m)?)(?:validate )?step: *\d+(?=  )")


def logs_here(parallel_dims: ParallelDims, job_config: MergedConfig) -> bool:
    """Whether this is the rank whose losses upstream logs. It decides that in a private function."""
    from torchtitan.components.metrics import _get_metrics_rank

    return torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config)


@contextmanager
def step_line(beginning: str, here: bool = True) -> Iterator[None]:
    """Meanwhile, upstream's line of a step, or of its validation, reads ``beginning`` in place of "step:  5" or
    "validate step:  5"; its figures stay as they are.

    Upstream computes the figures, formats the line and logs it in one method, without a hook. Its message is changed
    where it passes the logger: any other way would print a second line, or copy the method. Other messages, and a
    line that begins in another way than 0.2.2's, pass unchanged.

    Args:
        here: whether this is the rank whose line is for the console (``seams.console``).
    """

    def rewrite(record: logging.LogRecord) -> bool:
        record.msg = _STEP.sub(lambda found: found["colour"] + beginning, str(record.msg))
        record.here = here
        return True

    logger.addFilter(rewrite)
    try:
        yield
    finally:
        logger.removeFilter(rewrite)


def print_colours_to_terminals_only(processor: MetricsProcessor) -> None:
    """No colour codes in files and pipes.

    The setting for it, ``metrics.disable_color_printing``, is left alone: Stage 2 would take it over from Stage 1,
    wherever that one printed.
    """
    from torchtitan.tools.utils import NoColor

    if not sys.stdout.isatty():
        processor.color = NoColor()
