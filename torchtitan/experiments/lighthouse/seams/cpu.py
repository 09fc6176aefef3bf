"""Lets torchtitan train on CPU, for demonstrations and tests.

torchtitan looks for an accelerator when it is imported, assumes CUDA where there is none, and asks the device module
for things that ``torch.cpu`` lacks.
"""

import os
import platform
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch


class CPUDeviceModule:
    """``torch.cpu`` with the questions that torchtitan asks of an accelerator; memory is the process's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return platform.processor() or "CPU"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self) -> None:
        """The operating system's peak is the whole process's: it cannot be reset."""

    def empty_cache(self) -> None:
        """There is no cache."""


def use_cpu_without_accelerator() -> None:
    """Where there is no accelerator, point every loaded torchtitan module at the CPU; others load after this.

    To be called before a trainer is built. Running ``-m torchtitan.…`` imports torchtitan's packages first, so its
    modules cannot be prepared before they bind ``device_type``: they are bound again here.
    """
    if torch.accelerator.is_available():
        return
    from torchtitan.tools import utils

    before = {"device_type": utils.device_type, "device_module": utils.device_module}
    after = {"device_type": "cpu", "device_module": CPUDeviceModule()}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "torchtitan":
            for attribute, value in before.items():
                if getattr(module, attribute, None) is value:
                    setattr(module, attribute, after[attribute])
    # The CPU is one device however many processes share it: "cpu:1" does not exist.
    os.environ["LOCAL_RANK"] = "0"
