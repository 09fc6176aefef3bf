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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.experimental._context_parallel import _attention

aten = torch.ops.aten

#: [B, H, N, D]
SEQ_DIM = 2


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


def support_ring_attention() -> None:
    """Teach torch's context parallelism the attention operators that run on CPU.

    Its ring is written for any operator; its dispatcher knows those of GPUs only.
    """
    _attention.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu.default] = _ring_forward
    _attention.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = _ring_backward


def _ring_forward(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, DTensor]:
    """(query, key, value, dropout_p, is_causal, *, attn_mask, scale) to output and logsumexp, sharded as the query."""
    query, key, value = args[:3]
    bound = _bound(op, args, kwargs)
    out, logsumexp = _attention._templated_ring_attention(
        query.device_mesh.get_group(), SEQ_DIM, op, *(x._local_tensor for x in (query, key, value)),
        is_causal=bound["is_causal"], scale=bound["scale"],
    )  # fmt: skip
    return _sharded(out, query), _sharded(logsumexp, query)


def _ring_backward(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask, scale) to the gradients."""
    bound = _bound(op, args, kwargs)
    local = {name: bound[name]._local_tensor for name in ("grad_out", "query", "key", "value", "out", "logsumexp")}
    grads = _attention._templated_ring_attention_backward(
        bound["query"].device_mesh.get_group(), SEQ_DIM, op, grad_out_name="grad_out", **local,
        is_causal=bound["is_causal"], dropout_p=0.0, scale=bound["scale"],
    )  # fmt: skip
    return tuple(_sharded(grad, bound["query"]) for grad in grads[:3])


def _bound(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The operator's arguments by name, defaults included."""
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    return defaults | dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs


def _sharded(local: torch.Tensor, like: DTensor) -> DTensor:
    """A rank's part of a tensor that is sharded over the sequence as ``like`` is."""
    shape = list(local.shape)
    shape[SEQ_DIM] *= like.device_mesh.size()
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(
        like.device_mesh, like.placements, tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype)
    )
    return DTensor(local, spec, requires_grad=False)
