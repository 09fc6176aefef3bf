"""Stand-ins for the packages of FlashAttention 3 and 4: the same names and layouts, in plain torch."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from lighthouse import flash_packages, inner_attention
from lighthouse.pyramid import accumulation_dtype

#: The calls that were made of a stand-in: its name and the shape of the queries, [B, N, H, D].
Calls = list[tuple[str, tuple[int, ...]]]


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, H, D] and twice [B, N, G, D] to causal attention's rows and log-sum-exps [B, H, N], float32
    (float64 for float64 inputs)."""
    per_group = query.shape[2] // key.shape[2]
    query, key, value = (x.to(accumulation_dtype(x.dtype)).transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(per_group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    position = torch.arange(query.shape[2], device=query.device)
    scores = scores.masked_fill(position[:, None] < position, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)


def differentiate(grad, query, key, value, out, sums) -> list[Tensor]:
    """The three gradients, float32; ``out`` and ``sums`` must be what ``attend`` returned, rounded."""
    with torch.enable_grad():
        rows = [x.detach().float().requires_grad_() for x in (query, key, value)]
        again, sums_again = attend(*rows)
        torch.testing.assert_close(out, again.to(out.dtype))
        torch.testing.assert_close(sums, sums_again)
        return list(torch.autograd.grad(again, rows, grad.float()))


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Both packages, on any device."""
    calls: Calls = []

    def forward(name, query, key, value):
        calls.append((name, tuple(query.shape)))
        out, sums = attend(query, key, value)
        return out.to(query.dtype).contiguous(), sums

    # What FlashAttention 3 registers with torch: it writes its gradients into tensors that it is given.
    def fwd(q, k, v, *, softmax_scale, is_causal, num_splits):
        assert is_causal and softmax_scale == q.shape[-1] ** -0.5 and num_splits == 1
        return *forward("flash3", q, k, v), None, None

    def bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *, softmax_scale, is_causal, deterministic):
        assert is_causal and softmax_scale == q.shape[-1] ** -0.5
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        for to, grad in zip((dq, dk, dv), differentiate(dout, q, k, v, out, softmax_lse), strict=True):
            to.copy_(grad)

    # Of FlashAttention 4, 4.0.0b36.
    def _flash_attn_fwd(q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False):
        assert causal and return_lse and softmax_scale is None
        return *forward("flash4", q, k, v), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False, dq=None, dk=None, dv=None
    ):
        assert causal and softmax_scale is None and deterministic == torch.are_deterministic_algorithms_enabled()
        for to, grad in zip((dq, dk, dv), differentiate(dout, q, k, v, out, lse), strict=True):
            to.copy_(grad)
        return dq, dk, dv

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=fwd, bwd=bwd), raising=False)
    monkeypatch.setattr(inner_attention, "check_machine", lambda *_: None)
    flash_packages.load.cache_clear()
    monkeypatch.setattr(flash_packages, "load", flash_packages.load.__wrapped__)
    return calls
