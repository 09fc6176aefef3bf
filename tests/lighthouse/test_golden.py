"""The float64 reference's golden vectors (tests/golden/make.py says what they hold and how they were written)."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from lighthouse import LighthouseConfig, lighthouse_attention, select

INTERPRETED = {"device": "cpu", "backend": "triton"}
FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request) -> dict[str, np.ndarray]:
    with np.load(request.param) as arrays:
        return dict(arrays)


def settings(golden, backend) -> LighthouseConfig:
    stored = {field.name: golden[field.name].item() for field in fields(LighthouseConfig) if field.name in golden}
    return LighthouseConfig(**stored, backend=backend)


def tensors(golden, *names, dtype, device) -> list[torch.Tensor]:
    denominator = golden["denominator"].item()
    return [(torch.from_numpy(golden[name])[None].double() / denominator).to(device, dtype) for name in names]


def test_every_case_is_here():
    assert [path.stem for path in FILES] == [
        "l2_p4_ties", "l3_p2_causal_window", "l3_p2_delayed", "l3_p2_grouped", "l3_p4", "l4_p2_authors",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_selection_entry_for_entry(golden, dtype, on):
    """In every precision: the inputs' squared norms are exact in all of them."""
    if on == INTERPRETED and dtype == torch.float64:
        pytest.skip("slow; float64 is part of test_output_and_gradients")
    selection = select(
        *tensors(golden, "query", "key", dtype=dtype, device=on["device"]), settings(golden, on["backend"])
    )
    assert np.array_equal(selection.level[0].cpu().numpy(), golden["level"])
    assert np.array_equal(selection.index[0].cpu().numpy(), golden["index"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_output_and_gradients(golden, dtype, on):
    """Every result is a chain of sums of at most S terms that are no larger than the tensor's largest element.

    float64: the file's rounding to float32, at most 2⁻²⁴ of each value, and S roundings of 2⁻⁵³ of the largest, with 8
    for the sums that follow one another and the softmax's exponentials: 10⁻¹² of the largest.
    float32: as with the authors' golden files, 8 · √S · 2⁻²⁴ of the largest; roundings go up and down, hence the root.
    """
    if on == INTERPRETED and dtype == torch.float32:
        pytest.skip("slow; as exact in float64, and the kernels' float32 is part of test_kernels")
    config = settings(golden, on["backend"])
    *inputs, grad = tensors(golden, "query", "key", "value", "grad", dtype=dtype, device=on["device"])
    leaves = [x.requires_grad_() for x in inputs]
    output = lighthouse_attention(*leaves, config)
    output.backward(grad)
    results = {
        "output": output.detach(),
        **dict(zip(("query_grad", "key_grad", "value_grad"), (x.grad for x in leaves), strict=True)),
    }
    selected = golden["level"].shape[-1]
    for name, got in results.items():
        want = torch.from_numpy(golden[name]).double()
        if dtype == torch.float64:
            allowed = 2**-24 * want.abs() + 8 * selected * 2**-53 * want.abs().max()
        else:
            allowed = 8 * selected**0.5 * 2**-24 * want.abs().max()
        assert got.dtype == dtype
        assert ((got[0].cpu().double() - want).abs() <= allowed).all(), name
