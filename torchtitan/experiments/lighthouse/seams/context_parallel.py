"""What torch's context parallelism needs beside what upstream sets up: rotation, overlap, layout, and CPU operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

aten = torch.ops.aten

#: [B, H, N, D]
SEQ_DIM = 2

#: The compiler's pass that starts exchanges early, waits for them late and puts what need not wait in between, weight
#: gradients for one; it runs none by default. It keeps the order of the exchanges, which must be the same on all ranks.
OVERLAP: list[str | Callable[..., Any]] = ["reorder_compute_for_overlap"]


def set_rotation(method: str) -> None:
    """How keys and values travel. Upstream reads its setting for validation only."""
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(method)


def overlap_exchanges() -> None:
    """While it is traced, the ring waits for an exchange where it starts it: let the compiler put attention between."""
    from torch._inductor import config as inductor

    inductor.reorder_for_compute_comm_overlap = True
    inductor.reorder_for_compute_comm_overlap_passes = OVERLAP


def remember_layout() -> None:
    """Make the head-tail layout once: upstream makes a list of all positions for every batch, and then waits until the
    device has run everything before it copies the list there.
    """
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

    make = _HeadTailLoadBalancer._generate_indices
    if hasattr(make, "__wrapped__"):
        return

    @cache
    def indices(seq_length: int, world_size: int, device: str | torch.device, restore: bool) -> Tensor:
        return make(_HeadTailLoadBalancer(seq_length, world_size, device), restore)

    @wraps(make)
    def remembered(self: _HeadTailLoadBalancer, restore: bool = False) -> Tensor:
        return indices(self.seq_length, self.world_size, self.device, restore)

    _HeadTailLoadBalancer._generate_indices = remembered  # type: ignore[method-assign]


def support_ring_on_cpu() -> None:
    """Teach torch's context parallelism the attention operators that run on CPU.

    Its ring is written for any operator; its dispatcher knows those of GPUs only.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu.default] = _ring_forward
    _attention.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = _ring_backward


def _ring_forward(
    op_call: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[DTensor, DTensor]:
    """(query, key, value, dropout_p, is_causal, *, attn_mask, scale) to output and logsumexp, sharded as the query."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    query, key, value = args[:3]
    bound = _bound(op_call, args, kwargs)
    out, logsumexp = _attention._templated_ring_attention(
        query.device_mesh.get_group(), SEQ_DIM, op_call, query._local_tensor, key._local_tensor, value._local_tensor,
        is_causal=bound["is_causal"], scale=bound["scale"],
    )  # fmt: skip
    return _sharded(out, query), _sharded(logsumexp, query)


def _ring_backward(
    op_call: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[DTensor, ...]:
    """(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask, scale) to the gradients."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    bound = _bound(op_call, args, kwargs)
    local = {name: bound[name]._local_tensor for name in ("grad_out", "query", "key", "value", "out", "logsumexp")}
    grads = _attention._templated_ring_attention_backward(
        bound["query"].device_mesh.get_group(), SEQ_DIM, op_call, grad_out_name="grad_out", **local,
        is_causal=bound["is_causal"], dropout_p=0.0, scale=bound["scale"],
    )  # fmt: skip
    return tuple(_sharded(grad, bound["query"]) for grad in grads[:3])


def _bound(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The operator's arguments by name, defaults included."""
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    return defaults | dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs


def _sharded(local: Tensor, like: DTensor) -> DTensor:
    """A rank's part of a tensor that is sharded over the sequence as ``like`` is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = list(local.shape)
    shape[SEQ_DIM] *= like.device_mesh.size()
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(
        like.device_mesh, like.placements, tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype)
    )
    return DTensor(local, spec, requires_grad=False)
