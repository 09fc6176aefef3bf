import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.cases import GEOMETRIES, entries, make, qkv, random_rows, run, what_is_kept
from helpers.reference import attend_naively
from lighthouse import LighthouseAttention, LighthouseConfig, attend_selected, lighthouse_attention, select
from lighthouse.attention import gather, scatter
from lighthouse.local_window import attend_locally

HALF = (torch.bfloat16, torch.float16)


def reference(query, key, value, selection, config, turn=None):
    """float64, head by head; each query head uses its group's key/value head and selection."""
    batch, heads = query.shape[:2]
    per_group = heads // key.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    attend_naively(
                        query[b, h], *(x[b, h // per_group] for x in (key, value)),
                        entries(selection, b, h // per_group), config.pooling_factor, turn, config.local_window,
                    )
                    for h in range(heads)
                ]
            )
            for b in range(batch)
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("geometry", "heads", "groups", "batch"),
    [
        (GEOMETRIES[0], 2, 2, 1), (GEOMETRIES[1], 4, 2, 2), (GEOMETRIES[2], 2, 1, 1), (GEOMETRIES[3], 1, 1, 1),
    ],
)  # fmt: skip
def test_output_and_gradients_equal_the_definition(geometry, heads, groups, batch, on):
    device = on["device"]
    config, seq_len = make(*geometry, backend=on["backend"])
    inputs = qkv(seq_len, heads=heads, groups=groups, batch=batch)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    selection = select(inputs[0], inputs[1], replace(config, backend="torch"))
    expected = run(*inputs, config, grad, lambda q, k, v, c: reference(q, k, v, selection, c))
    ours = run(*(x.to(device) for x in inputs), config, grad.to(device))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("geometry", "window", "selection"), [((512, 3, 2, 128), 128, "causal"), ((1024, 3, 2, 256), 384, "published")]
)
def test_a_local_window_fills_exactly_the_holes(geometry, window, selection, on):
    """Output and gradients against the definition, grouped heads; and nothing changes at any other position."""
    config, seq_len = make(*geometry, selection=selection, local_window=window, backend=on["backend"])
    inputs = qkv(seq_len, heads=2, groups=1, batch=2 if window == 128 else 1)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    chosen = select(inputs[0], inputs[1], replace(config, backend="torch"))
    expected = run(*inputs, config, grad, lambda q, k, v, c: reference(q, k, v, chosen, c))
    on_device = [x.to(on["device"]) for x in inputs]
    ours = run(*on_device, config, grad.to(on["device"]))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)
    without = lighthouse_attention(*on_device, replace(config, local_window=0)).cpu()
    changed = (without != ours[0].cpu()).any(-1)
    hole = (chosen.inverse_map[..., :seq_len] < 0).repeat_interleave(2, dim=1)
    assert torch.equal(changed, hole) and hole.any() and not hole.all()


def test_gradients_of_a_window_are_added_where_the_gather_makes_its_own(on):
    """Not by autograd, which would read and write query, key and value once more."""
    config, seq_len = make(*GEOMETRIES[1], local_window=128, backend=on["backend"])
    leaves = [x.requires_grad_() for x in qkv(seq_len, heads=2, groups=1, device=on["device"])]
    out = lighthouse_attention(*leaves, config)
    below, seen = [out.grad_fn], set()
    while below:
        node = below.pop()
        if node is not None and node not in seen:
            seen.add(node)
            below += [before for before, _ in node.next_functions]
    accumulated = [node for node in seen if hasattr(node, "variable")]
    assert {id(node.variable) for node in accumulated} == {id(x) for x in leaves}
    for node in accumulated:
        users = [(user.name(), slot) for user in seen for before, slot in user.next_functions if before is node]
        assert len(users) == 1, users


@pytest.mark.parametrize("window", [1024, 2048])
def test_a_window_over_everything_is_dense_where_nothing_is_selected(window):
    config, seq_len = make(1024, 3, 2, 128)
    query, key, value = qkv(seq_len, heads=4, groups=2)
    selection = select(query, key, config)
    nothing = replace(selection, inverse_map=torch.full_like(selection.inverse_map, -1))
    local = attend_locally(query, key, value, window)
    rows = torch.zeros(1, 4, selection.entry.shape[-1], 16, dtype=query.dtype)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(scatter(rows, nothing, seq_len, config, "torch", local=local), dense)


def test_a_window_alone_is_local_attention(on):
    config = LighthouseConfig(selection="none", local_window=128, backend=on["backend"])
    inputs = qkv(500, heads=4, groups=2, device=on["device"])
    ours = lighthouse_attention(*inputs, config, rotate=lambda rows, position: rows + position[0, 0, :, None])
    turned = [rows + torch.arange(500, device=on["device"])[:, None] for rows in inputs[:2]]
    torch.testing.assert_close(ours, attend_locally(*turned, inputs[2], 128))
    with pytest.raises(ValueError, match="selects nothing"):
        select(*inputs[:2], config)


@pytest.mark.parametrize(("seq_len", "window"), [(640, 128), (500, 384), (320, 256), (96, 128)])
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_local_attention_is_attention_under_a_band(seq_len, window, dtype, device):
    """Any length; grouped heads; and the later part with the rows before it equals the later part of the whole.

    In low precision: as good as stock attention of that dtype, up to a factor of two."""
    inputs = qkv(seq_len, heads=4, groups=2, batch=2, head_dim=16, dtype=dtype, device=device)
    position = torch.arange(seq_len, device=device)
    distance = position[:, None] - position
    band = (distance >= 0) & (distance < window)

    def banded(q, k, v, _=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)

    def local(q, k, v, _=None):
        return attend_locally(q, k, v, window)

    def in_two(q, k, v, _=None):
        half = seq_len // 2
        if half < window:
            return local(q, k, v)
        before = [rows[:, :, half - window : half] for rows in (k, v)]
        later = attend_locally(*(rows[:, :, half:] for rows in (q, k, v)), window, before=before, starts_every=0)
        return torch.cat([attend_locally(*(rows[:, :, :half] for rows in (q, k, v)), window), later], dim=2)

    grad = random_rows(*inputs[0].shape, seed=9, dtype=dtype, device=device)
    exact = run(*(x.double() for x in inputs), None, grad.double(), banded)
    stock = run(*inputs, None, grad, banded)
    for attention in (local, in_two):
        for got, want, other in zip(run(*inputs, None, grad, attention), exact, stock, strict=True):
            assert got.dtype == dtype
            allowed = 1e-12 * want.norm() if dtype == torch.float64 else 2 * (other.double() - want).norm()
            assert (got.double() - want).norm() <= allowed


@pytest.mark.parametrize(("groups", "window"), [(None, 0), (1, 0), (1, 128)])
@pytest.mark.parametrize("geometry", GEOMETRIES[:2])
def test_rotary_embedding_after_the_gather_equals_the_definition(geometry, groups, window, on):
    """Pooled without, then each entry turned by its last covered position, and rows of the window each by its own; and
    turned by 0 it is no embedding."""
    config, seq_len = make(*geometry, local_window=window, backend=on["backend"])
    inputs = qkv(seq_len, heads=2, groups=groups, head_dim=4)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    frequency = torch.tensor([0.3, 0.002], dtype=torch.float64)

    def turn(rows, position):
        angle = frequency * position[:, None]
        turned = torch.view_as_complex(rows.view(-1, 2, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(1)

    def rotate(rows, position):
        angle = (position[..., None] * frequency.to(position.device)).repeat_interleave(
            rows.shape[1] // position.shape[1], dim=1
        )
        (x, y), cos, sin = rows.unflatten(-1, (-1, 2)).unbind(-1), angle.cos(), angle.sin()
        return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)

    selection = select(inputs[0], inputs[1], replace(config, backend="torch"))
    expected = run(*inputs, config, grad, lambda q, k, v, c: reference(q, k, v, selection, c, turn))
    ours = run(
        *(x.to(on["device"]) for x in inputs),
        config,
        grad.to(on["device"]),
        partial(lighthouse_attention, rotate=rotate),
    )
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)


def test_rotary_embedding_after_the_gather_is_for_the_norm_scorer():
    config, seq_len = make(1024, 3, 2, 128, scorer="dilated")
    with pytest.raises(ValueError, match=r"'dilated' attends to rotated .* 'norm'"):
        lighthouse_attention(*qkv(seq_len), config, rotate=lambda rows, position: rows)


@pytest.mark.parametrize("name", ["norm_n2048_p2_l3_k256", "norm_n4096_p2_l4_k256"])
def test_golden_files_of_the_authors(name, shared_dir, on):
    """Selection and order entry for entry; values to float32 rounding.

    The golden outputs and gradients are float32 sums of terms as large as the tensors' largest elements, over at
    most S rows: both sides err by about sqrt(S) · 2⁻²⁴ of that, plus the softmax's exponentials, hence the 8.
    """
    if (name, *on.values()) == ("norm_n4096_p2_l4_k256", "cpu", "triton"):
        pytest.skip("on a GPU only: it takes the interpreter long, which tests/golden has four levels for")
    golden = np.load(shared_dir / "golden" / f"{name}.npz")
    _, pooling_factor, num_levels, top_k, _, _ = (int(x) for x in golden["params"])
    config = LighthouseConfig(
        num_levels=num_levels,
        pooling_factor=pooling_factor,
        top_k=top_k,
        cover_start=False,
        backend=on["backend"],
    )
    device = on["device"]
    query, key, value, grad = (torch.from_numpy(golden[x])[None].to(device) for x in ("q", "k", "v", "grad_out"))
    selection = select(query, key, config)
    assert np.array_equal(selection.level[0].cpu().numpy(), golden["level"])
    assert np.array_equal(selection.index[0].cpu().numpy(), golden["index"])
    selected = config.selected_length(query.shape[2])
    for got, name in zip(run(query, key, value, config, grad), ("out", "dq", "dk", "dv"), strict=True):
        want = torch.from_numpy(golden[name])
        tolerance = 8 * selected**0.5 * 2**-24 * want.abs().max().item()
        assert (got[0].cpu() - want).abs().max().item() <= tolerance, name


def test_everything_selected_and_attended_as_single_rows_is_dense():
    """Two levels, every coarse window a parent: all entries are kept. Level 0 alone would then be dense attention,
    so take the coarse level's share out with keys that no query sees and values that are zero."""
    config, seq_len = make(256, 2, 2, 128)
    query, key, value = qkv(seq_len)
    selection = select(query, key, config)
    assert selection.entry.shape[-1] == seq_len + seq_len // 2

    def level_0_only(q, k, v):
        coarse = selection.level[0, 0] > 0
        bias = torch.zeros(coarse.numel(), coarse.numel(), dtype=q.dtype).masked_fill(coarse[None, :], float("-inf"))
        causal = torch.ones_like(bias, dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~causal, float("-inf")))
        return out.nan_to_num().masked_fill(coarse[:, None], 0)

    ours = attend_selected(query, key, value, selection, config, attention=level_0_only)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_a_small_budget_differs_from_dense():
    config, seq_len = make(2048, 3, 4, 128)
    query, key, value = qkv(seq_len)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (lighthouse_attention(query, key, value, config) - dense).norm() > 0.1 * dense.norm()


@pytest.mark.parametrize("position", [0, 1, 511, 512, 1000, 1023])
def test_causal_given_the_selection(position):
    config, seq_len = make(1024, 3, 2, 128)
    inputs = qkv(seq_len)
    selection = select(inputs[0], inputs[1], config)
    before = attend_selected(*inputs, selection, config)
    for changed in range(3):
        other = [x.clone() for x in inputs]
        other[changed][:, :, position] += 1.0
        after = attend_selected(*other, selection, config)
        assert torch.equal(before[:, :, :position], after[:, :, :position])
        if changed == 2:
            assert not torch.equal(before, after)


def test_gradients_equal_finite_differences_through_the_fixed_selection():
    config, seq_len = make(256, 2, 2, 128)
    query, key, value = (x.requires_grad_() for x in qkv(seq_len, heads=2, groups=1, head_dim=2))
    selection = select(query, key, config)
    torch.autograd.gradcheck(
        lambda *x: attend_selected(*x, selection, config), (query, key, value), fast_mode=True, nondet_tol=0.0
    )


@pytest.mark.parametrize("scorer", ["norm", "dilated", "gla"])
def test_the_same_inputs_give_the_same_bits(scorer, on):
    config, seq_len = make(512, 3, 2, 128, scorer=scorer, backend=on["backend"])
    device = on["device"]
    inputs = qkv(seq_len, heads=2, groups=1, dtype=torch.float32, device=device)
    grad = random_rows(*inputs[0].shape, seed=9, device=device)
    first, second = run(*inputs, config, grad), run(*inputs, config, grad)
    # cuDNN's and Flash's backward are not promised to be deterministic: on a GPU only the forward is compared.
    for a, b in zip(first[: 1 if device == "cuda" else 4], second, strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [2, 1])
def test_strided_inputs_equal_contiguous_ones(groups, on):
    """[B, N, H, D] seen as [B, H, N, D], as attention modules hand it over, and a non-contiguous gradient."""
    config, seq_len = make(512, 3, 2, 128, backend=on["backend"])
    device = on["device"]
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(seq_len, heads=2, groups=groups)]
    inputs = [x.to(device) for x in inputs]
    assert not inputs[0].is_contiguous()
    grad = random_rows(1, seq_len, 2, 16, seed=9, dtype=torch.float64, device=device).transpose(1, 2)
    strided = run(*inputs, config, grad)
    contiguous = run(*(x.contiguous() for x in inputs), config, grad.contiguous())
    for a, b in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scorer", ["norm", "dilated", "gla"])
def test_grouped_heads_equal_repeated_ones(scorer):
    """With equal query heads in a group every head selects alike, so grouping must change nothing."""
    config, seq_len = make(1024, 3, 2, 128, scorer=scorer)
    query, key, value = qkv(seq_len, heads=2, groups=2)
    query = query.repeat_interleave(3, dim=1)
    grouped = lighthouse_attention(query, key, value, config)
    repeated = lighthouse_attention(query, *(x.repeat_interleave(3, dim=1) for x in (key, value)), config)
    torch.testing.assert_close(grouped, repeated, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", HALF)
def test_low_precision_rounds_once(dtype, on):
    """Gather, scatter and their backwards sum in float32 and round to the dtype at the end: an error of at most half
    a unit in the last place of the exact result, which float64 gives from the same rounded inputs. The float32 sums
    themselves err by L + log₂N roundings of 2⁻²⁴ of the terms' sizes."""
    config, seq_len = make(1024, 4, 2, 128, backend=on["backend"])
    device = on["device"]
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    ulps = 1.0 if (device, on["backend"], dtype) == ("cpu", "triton", torch.bfloat16) else 0.5
    rows, keys = qkv(seq_len, dtype=dtype, device=device)[:2]
    selection = select(rows, keys, config)
    short = random_rows(1, 2, config.selected_length(seq_len), 16, seed=5, dtype=dtype, device=device)

    def both(function, x, grad, backend="torch"):
        x = x.detach().requires_grad_()
        out = function(x, backend)
        out.backward(grad.to(out.dtype))
        return out.detach(), x.grad

    cases = {
        "gather": (lambda x, backend: gather(x, selection, config, backend), rows, short),
        "scatter": (lambda x, backend: scatter(x, selection, seq_len, config, backend), short, rows),
    }
    for name, (function, x, grad) in cases.items():
        exact = both(function, x.double(), grad)
        size = both(function, x.double().abs(), grad.abs())
        for got, want, magnitude in zip(both(function, x, grad, on["backend"]), exact, size, strict=True):
            allowed = ulps * torch.finfo(dtype).eps * want.abs() + 16 * 2**-24 * magnitude + torch.finfo(dtype).tiny
            assert got.dtype == dtype
            assert ((got.double() - want).abs() <= allowed).all(), name


@pytest.mark.parametrize("dtype", HALF)
def test_low_precision_is_as_good_as_its_attention(dtype, on):
    """Against float64 through the same selection: no worse than stock attention in that dtype on the exact gathered
    rows, plus the two roundings around it (gather and scatter, each half a unit in the last place)."""
    config, seq_len = make(1024, 3, 2, 128, backend=on["backend"])
    device = on["device"]
    inputs = qkv(seq_len, head_dim=32, dtype=dtype, device=device)
    selection = select(inputs[0], inputs[1], config)
    got = attend_selected(*inputs, selection, config)
    config = replace(config, backend="torch")
    exact = attend_selected(*(x.double() for x in inputs), selection, config)

    def rounded_attention(*rows):
        return F.scaled_dot_product_attention(*(x.to(dtype) for x in rows), is_causal=True).double()

    baseline = attend_selected(*(x.double() for x in inputs), selection, config, attention=rounded_attention)
    budget = (baseline - exact).norm() + 2 * torch.finfo(dtype).eps / 2 * exact.norm()
    assert (got.double() - exact).norm() <= budget


def test_autocast_leaves_scores_alone():
    config, seq_len = make(1024, 3, 2, 128, scorer="gla")
    inputs = qkv(seq_len, dtype=torch.float32)
    expected = select(inputs[0], inputs[1], config, value=inputs[2])
    with torch.autocast("cpu", torch.bfloat16):
        got = select(inputs[0], inputs[1], config, value=inputs[2])
    assert torch.equal(got.entry, expected.entry)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({"scorer": scorer}, torch.float32) for scorer in ("norm", "dilated", "gla")]
    + [({"selection": "causal", "local_window": 128}, dtype) for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_compiles_into_one_graph(settings, dtype, on):
    config, seq_len = make(512, 3, 2, 128, **settings, backend=on["backend"])
    device = on["device"]
    inputs = qkv(seq_len, heads=2, groups=1, dtype=dtype, device=device)
    grad = random_rows(*inputs[0].shape, seed=9, device=device)
    torch.compiler.reset()  # it gives up after eight versions of a function
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(*inputs, config, grad, compiled), run(*inputs, config, grad), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [0, 128])
def test_activation_checkpointing_recomputes_the_same(window, on):
    config, seq_len = make(512, 3, 2, 128, local_window=window, backend=on["backend"])
    device = on["device"]
    inputs = qkv(seq_len, heads=1, dtype=torch.float32, device=device)
    grad = random_rows(*inputs[0].shape, seed=9, device=device)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(lighthouse_attention, *arguments, use_reentrant=False)

    for got, want in zip(run(*inputs, config, grad, checkpointed), run(*inputs, config, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if device == "cpu" else 1e-5)


def test_between_forward_and_backward_only_indices_and_gathered_rows_are_kept():
    """Nothing of length N but the inverse map, once, and what attention itself keeps of the S rows."""
    config, seq_len = make(4096, 3, 4, 128)
    inputs = [x.requires_grad_() for x in qkv(seq_len, dtype=torch.float32)]
    with what_is_kept() as kept:
        lighthouse_attention(*inputs, config)
    floating = [x.shape[2] for x in kept.values() if x.is_floating_point()]
    assert floating and max(floating) == config.selected_length(seq_len) < seq_len
    assert sorted({x.shape[-1] for x in kept.values() if not x.is_floating_point() and x.dim() == 3}) == [
        config.selected_length(seq_len),
        seq_len + seq_len // 4 + seq_len // 16,
    ]


def test_module_has_nothing_to_save():
    config, seq_len = make(1024, 3, 2, 128)
    module = LighthouseAttention(config, torch.nn.Identity())
    assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())
    assert copy.deepcopy(module).config == config
    inputs = qkv(seq_len)
    torch.testing.assert_close(LighthouseAttention(config)(*inputs), lighthouse_attention(*inputs, config))
    with pytest.raises(ValueError, match="enable_gqa"):
        LighthouseAttention(config)(*qkv(seq_len, heads=4, groups=2))


def test_the_inner_attention_is_the_one_that_is_given():
    config, seq_len = make(1024, 3, 2, 128)
    seen = []

    def spy(query, key, value, **kwargs):
        seen.append((query.shape, key.shape, kwargs))
        return torch.zeros_like(query)

    for groups, kwargs in ((4, {}), (2, {"enable_gqa": True})):
        output = lighthouse_attention(*qkv(seq_len, heads=4, groups=groups), config, attention=spy)
        assert not output.any()
        selected = config.selected_length(seq_len)
        assert seen.pop() == ((1, 4, selected, 16), (1, groups, selected, 16), kwargs)


@pytest.mark.parametrize("rotate", [None, lambda rows, position: rows], ids=["published", "rotate"])
def test_the_backend_is_resolved_once_per_forward(rotate, monkeypatch, on):
    config, seq_len = make(256, 2, 2, 128, backend=on["backend"])
    resolve, resolved = LighthouseConfig.resolve_backend, []

    def spy(config, device_type):
        resolved.append(resolve(config, device_type))
        return resolved[-1]

    monkeypatch.setattr(LighthouseConfig, "resolve_backend", spy)
    lighthouse_attention(*qkv(seq_len, heads=1, device=on["device"]), config, rotate=rotate)
    assert resolved == [on["backend"]]


def test_a_backend_that_is_passed_on_is_the_one_that_runs(monkeypatch):
    """Without one, ``select`` and ``attend_selected`` resolve it themselves."""
    config, seq_len = make(1024, 3, 2, 128, backend="torch")
    query, key, value = qkv(seq_len)
    monkeypatch.setattr("lighthouse.selection._select_by_kernels", lambda *_: "kernels")
    assert select(query, key, config, backend="triton") == "kernels"
    selection = select(query, key, config)
    expected = attend_selected(query, key, value, selection, config)
    monkeypatch.setattr("lighthouse.config.INTERPRETED", False)
    refused = replace(config, backend="triton")
    assert torch.equal(attend_selected(query, key, value, selection, refused, backend="torch"), expected)
    with pytest.raises(ValueError, match="'triton' is not available"):
        attend_selected(query, key, value, selection, refused)
    with pytest.raises(ValueError, match="'triton' is not available"):
        select(query, key, refused)


def test_inputs_that_do_not_fit_are_refused():
    config, seq_len = make(1024, 3, 2, 128)
    query, key, value = qkv(seq_len)
    with pytest.raises(ValueError, match=r"value is torch\.float32"):
        lighthouse_attention(query, key, value.float(), config)
    with pytest.raises(ValueError, match="floating"):
        lighthouse_attention(query.long(), key.long(), value.long(), config)
    with pytest.raises(ValueError, match="seq_len=1001"):
        lighthouse_attention(query[:, :, :1001], key[:, :, :1001], value[:, :, :1001], config)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "window"), [("torch", 0), ("triton", 0), ("triton", 512)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_full_length_on_a_gpu(backend, window):
    """98,304 tokens in bfloat16, forward and backward, against the same layer in float32."""
    config = LighthouseConfig(backend=backend, local_window=window, selection="causal" if window else "published")
    inputs = qkv(98304, heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    grad = random_rows(1, 8, 98304, 128, seed=9, dtype=torch.bfloat16, device="cuda")
    low = run(*inputs, config, grad)
    exact = run(*(x.float() for x in inputs), config, grad.float())
    for got, want in zip(low, exact, strict=True):
        assert (got.float() - want).norm() <= 8 * torch.finfo(torch.bfloat16).eps * want.norm()


def test_scores_may_be_of_other_rows_than_attention(on):
    """Only the selection changes: it is that of the rows named, and shapes and scorers that do not fit are refused."""
    config, seq_len = make(512, 3, 2, 128, backend=on["backend"])
    query, key, value = (rows.to(on["device"]) for rows in qkv(seq_len, heads=2, groups=1))
    by = (query.flip(2), key.flip(2))
    expected = attend_selected(query, key, value, select(*by, config), config)
    got = lighthouse_attention(query, key, value, config, score_by=by)
    assert torch.equal(got, expected) and not torch.equal(got, lighthouse_attention(query, key, value, config))
    with pytest.raises(ValueError, match="score_by of the key is"):
        lighthouse_attention(query, key, value, config, score_by=(query, query))
    with pytest.raises(ValueError, match="score_by needs the scorer 'norm'"):
        lighthouse_attention(query, key, value, replace(config, scorer="gla"), score_by=by)
