"""Levels and window as one softmax: ``combine = "softmax"`` (docs/method.md, section 10.6)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from helpers.cases import entries, make, qkv, random_rows, run, what_is_kept
from lighthouse import (
    LighthouseAttention,
    LighthouseConfig,
    attend_selected,
    flex,
    kernels,
    lighthouse_attention,
    merging,
    parts,
    select,
)


def merge_naively(query, key, value, selected, p, window, turn=None):
    """One head, [N, D] float64. Position by position: the scores that each of its parts saw, with that part's query,
    side by side in one softmax. No log-sum-exps."""
    seq_len, dim = query.shape
    levels = 1 + max(level for level, _ in selected)
    end = torch.tensor([(index + 1) * p**level - 1 for level, index in selected])
    pooled = [
        torch.stack([x[index * p**level : (index + 1) * p**level].mean(0) for level, index in selected])
        for x in (query, key, value)
    ]
    if turn is not None:
        pooled[:2] = [turn(x, end) for x in pooled[:2]]
        query, key = (turn(x, torch.arange(seq_len)) for x in (query, key))
    slot = {entry: number for number, entry in enumerate(selected)}
    out = []
    for t in range(seq_len):
        scores, values = [], []
        for level in range(levels):
            number = slot.get((level, (t + 1) // p**level - 1))
            if number is not None:
                scores.append(pooled[1][: number + 1] @ pooled[0][number])
                values.append(pooled[2][: number + 1])
        if window:
            first = max(0, t - window + 1)
            scores.append(key[first : t + 1] @ query[t])
            values.append(value[first : t + 1])
        out.append((torch.cat(scores) / dim**0.5).softmax(0) @ torch.cat(values) if scores else 0.0 * value[t])
    return torch.stack(out)


def reference(query, key, value, selection, config, turn=None):
    per_group = query.shape[1] // key.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    merge_naively(
                        query[b, h], key[b, h // per_group], value[b, h // per_group],
                        entries(selection, b, h // per_group), config.pooling_factor, config.local_window, turn,
                    )
                    for h in range(query.shape[1])
                ]
            )
            for b in range(len(query))
        ]
    )  # fmt: skip


def compare(inputs, config, on, size=1.0, tolerance=1e-10):
    """Output and gradients with the definition."""
    inputs = [inputs[0] * size, *inputs[1:]]
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    selection = select(inputs[0], inputs[1], replace(config, backend="torch"))
    expected = run(*inputs, config, grad, lambda q, k, v, c: reference(q, k, v, selection, c))
    ours = run(*(x.to(on["device"]) for x in inputs), config, grad.to(on["device"]))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance)
    return expected


@pytest.mark.parametrize(
    ("geometry", "heads", "groups", "batch", "window", "more"),
    [
        ((256, 2, 2, 128), 4, 2, 1, 128, {}), ((512, 3, 2, 128), 2, 1, 1, 256, {"selection": "causal"}),
        ((512, 3, 2, 128), 2, 2, 1, 0, {}), ((512, 2, 4, 128), 2, 1, 1, 640, {"scorer": "gla"}),
        ((256, 2, 2, 128), 1, 1, 2, 0, {"cover_start": False}),
    ],
)  # fmt: skip
def test_output_and_gradients_are_those_of_one_softmax_over_the_parts(geometry, heads, groups, batch, window, more, on):
    config, seq_len = make(*geometry, combine="softmax", local_window=window, backend=on["backend"], **more)
    inputs = qkv(seq_len, heads=heads, groups=groups, batch=batch, head_dim=8)
    if more.get("scorer"):
        # Selected with the values, which ``compare`` does not hand over.
        selection = select(*inputs[:2], replace(config, backend="torch"), value=inputs[2])
        ours = lighthouse_attention(*(x.to(on["device"]) for x in inputs), config)
        torch.testing.assert_close(ours.cpu(), reference(*inputs, selection, config))
        return
    compare(inputs, config, on)


def test_positions_without_a_part_are_zero_and_take_no_gradient():
    """Two levels, no ``cover_start``: with window 0 of the coarse level not expanded, position 0 has none."""
    config, seq_len = make(512, 2, 2, 128, combine="softmax", cover_start=False, backend="torch")
    query, key, value = qkv(seq_len, heads=1, head_dim=8)
    query[:, :, :2], key[:, :, :2] = 1e-3 * query[:, :, :2], 1e-3 * key[:, :, :2]
    selection = select(query, key, config)
    assert selection.inverse_map[0, 0, 0] < 0
    out, *grads = run(query, key, value, config, torch.ones_like(query))
    assert not out[:, :, 0].any() and out[:, :, 1:].any(-1).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_scores_of_thousands_neither_overflow_nor_vanish(on):
    """The log-sum-exps of a position's parts are thousands apart, and exp(710) is past float64. A score s has a
    rounding of s · 2⁻⁵³, and so has a weight's logarithm: 10⁻¹² at s = 10⁴; gradients have terms as large as s."""
    config, seq_len = make(512, 3, 2, 128, combine="softmax", local_window=128, backend=on["backend"])
    expected = compare(qkv(seq_len, heads=1, head_dim=8), config, on, size=3e3, tolerance=1e-7)
    query, key, _ = qkv(seq_len, heads=1, head_dim=8)
    assert (3e3 * query @ key.mT / 8**0.5).abs().max() > 5e3 and all(x.isfinite().all() for x in expected)


def test_weights_add_up_to_one():
    """Where all values are 1, so are all outputs, whatever was selected. (The sum of levels gives up to 3.)"""
    config, seq_len = make(512, 3, 2, 128, combine="softmax", local_window=128, backend="torch")
    query, key, value = qkv(seq_len, heads=4, groups=2)
    ones = torch.ones_like(value)
    torch.testing.assert_close(lighthouse_attention(query, key, ones, config), torch.ones_like(query))
    assert lighthouse_attention(query, key, ones, replace(config, combine="sum")).max() > 1.5


def test_with_a_window_over_everything_and_levels_out_of_sight_it_is_dense():
    """Levels whose keys all score −1000 below the window's weigh nothing, and take no gradient."""
    config, seq_len = make(512, 3, 2, 128, combine="softmax", local_window=512, backend="torch")
    inputs = qkv(seq_len, heads=4, groups=2)
    selection = select(inputs[0], inputs[1], config)
    rows = qkv(config.selected_length(seq_len), heads=4, groups=2)
    rows[0], rows[1] = torch.full_like(rows[0], 1e3), torch.full_like(rows[1], -1.0)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    short = tuple(x.requires_grad_() for x in rows)

    def merged(q, k, v, _):
        return merging.attend_and_merge(short, (q, k, v), selection, seq_len, config, "torch")

    def dense(q, k, v, _):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for got, want in zip(run(*inputs, config, grad, merged), run(*inputs, config, grad, dense), strict=True):
        torch.testing.assert_close(got, want)
    assert not any(x.grad.any() for x in short)


def test_rotary_embedding_after_the_gather_equals_the_definition():
    config, seq_len = make(512, 3, 2, 128, combine="softmax", local_window=128, backend="torch")
    inputs = qkv(seq_len, heads=2, groups=1, head_dim=4)
    frequency = torch.tensor([0.3, 0.002], dtype=torch.float64)

    def turn(rows, position):
        angle = position[..., None] * frequency
        (x, y), cos, sin = rows.unflatten(-1, (-1, 2)).unbind(-1), angle.cos(), angle.sin()
        return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)

    selection = select(inputs[0], inputs[1], replace(config, backend="torch"))
    ours = lighthouse_attention(*inputs, config, rotate=turn)
    torch.testing.assert_close(ours, reference(*inputs, selection, config, turn), rtol=1e-10, atol=1e-10)


def test_bfloat16_is_as_good_as_its_attention(on, monkeypatch):
    """Against float64 through the same selection: at most twice the error of stock attention in that dtype on the exact
    gathered rows, with exact log-sum-exps of its rounded queries and keys; and the roundings around it, half a unit in
    the last place each: the output; in the backward the weighted gradient, its sum over a window, and a row's."""
    config, seq_len = make(512, 3, 2, 128, combine="softmax", local_window=128, backend=on["backend"])
    dtype = torch.bfloat16
    inputs = qkv(seq_len, heads=1, head_dim=32, dtype=dtype, device=on["device"])
    grad = random_rows(*inputs[0].shape, seed=9, dtype=dtype, device=on["device"])
    selection = select(inputs[0], inputs[1], config)

    def selected(q, k, v, c):
        return attend_selected(q, k, v, selection, c)

    wide = [x.double() for x in (*inputs, grad)]
    got, exact = run(*inputs, config, grad, selected), run(*wide[:3], config, wide[3], selected)
    attend = parts.attend_plainly

    def rounded(query, key, value, window=None):
        rows = [x.to(dtype) for x in (query, key, value)]
        position = torch.arange(query.shape[2], device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < (window or len(position)))
        out = F.scaled_dot_product_attention(*rows, attn_mask=mask)
        return out.double(), attend(*(x.double() for x in rows), window)[1]

    monkeypatch.setattr(merging, "attend_plainly", rounded)
    stock = run(*wide[:3], replace(config, backend="torch"), wide[3], selected)
    for ours, want, other, roundings in zip(got, exact, stock, (1, 3, 3, 3), strict=True):
        assert ours.dtype == dtype
        budget = 2 * (other - want).norm() + roundings * torch.finfo(dtype).eps / 2 * want.norm()
        assert (ours.double() - want).norm() <= budget


def test_compiles_into_one_graph(on):
    """By kernels in bfloat16; plainly in float32, where torch 2.11 gets a cast wrong that does nothing."""
    config, seq_len = make(256, 2, 2, 128, combine="softmax", local_window=128, backend=on["backend"])
    dtype = torch.bfloat16 if on["backend"] == "triton" else torch.float32
    inputs = qkv(seq_len, heads=2, groups=1, dtype=dtype, device=on["device"])
    grad = random_rows(*inputs[0].shape, seed=9, dtype=dtype, device=on["device"])
    torch.compiler.reset()  # it gives up after eight versions of a function
    compiled = torch.compile(
        lighthouse_attention, fullgraph=True, backend="aot_eager" if on["device"] == "cpu" else "inductor"
    )
    for got, want in zip(run(*inputs, config, grad, compiled), run(*inputs, config, grad), strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)


def test_activation_checkpointing_recomputes_the_same(on):
    config, seq_len = make(256, 2, 2, 128, combine="softmax", local_window=128, backend=on["backend"])
    inputs = qkv(seq_len, dtype=torch.float32, device=on["device"])
    grad = random_rows(*inputs[0].shape, seed=9, device=on["device"])

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(lighthouse_attention, *arguments, use_reentrant=False)

    for got, want in zip(run(*inputs, config, grad, checkpointed), run(*inputs, config, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if on["device"] == "cpu" else 1e-5)


@pytest.mark.parametrize("position", [0, 511, 512, 1000])
def test_with_a_causal_selection_nothing_before_a_change_moves(position):
    config, seq_len = make(1024, 3, 2, 128, combine="softmax", local_window=128, selection="causal")
    inputs = qkv(seq_len)
    before = lighthouse_attention(*inputs, config)
    changed = [x.clone() for x in inputs]
    for rows in changed:
        rows[:, :, position:] = -3.0 * rows[:, :, position:]
    after = lighthouse_attention(*changed, config)
    assert torch.equal(before[:, :, :position], after[:, :, :position])
    assert not torch.equal(before[:, :, position], after[:, :, position])


def test_of_rows_of_the_whole_length_only_the_result_is_kept():
    """It costs nothing where the next layer keeps it too: in the order in which that one reads it."""
    config, seq_len = make(4096, 3, 4, 128, combine="softmax")
    inputs = [x.requires_grad_() for x in qkv(seq_len, dtype=torch.float32)]
    with what_is_kept() as kept:
        result = lighthouse_attention(*inputs, config)
    long = [x for x in kept.values() if x.is_floating_point() and x.dim() == 4 and x.shape[2] == seq_len]
    assert [x.untyped_storage().data_ptr() for x in long] == [result.untyped_storage().data_ptr()]
    assert result.transpose(1, 2).is_contiguous()
    assert any(x.shape[2] == config.selected_length(seq_len) for x in kept.values() if x.dim() == 4)


def test_another_attention_is_refused():
    config, seq_len = make(1024, 3, 2, 128, combine="softmax")
    inner = torch.nn.Identity()
    for make_it in (
        lambda: LighthouseAttention(config, inner),
        lambda: lighthouse_attention(*qkv(seq_len), config, attention=inner),
    ):
        with pytest.raises(ValueError, match=r"attention=Identity.*'softmax' needs .*: None \(or combine='sum'"):
            make_it()
    inputs = qkv(seq_len)
    assert torch.equal(LighthouseAttention(config)(*inputs), lighthouse_attention(*inputs, config))


def same_blocks(ours, expected):
    """The same blocks in the same order, and numbers that torch 2.11 reads with the strides of one list."""
    assert ours.shape == expected.shape
    for which in ("kv", "full_kv", "q", "full_q"):
        lists = [
            [
                [where[:count].tolist() for count, where in zip(*sequence, strict=True)]
                for sequence in zip(
                    getattr(mask, f"{which}_num_blocks")[:, 0], getattr(mask, f"{which}_indices")[:, 0], strict=True
                )
            ]
            for mask in (ours, expected)
        ]
        assert lists[0] == lists[1], which
    assert ours.kv_indices.stride() == ours.full_kv_indices.stride()
    assert ours.q_indices.stride() == ours.full_q_indices.stride()


class TestFlex:
    """What runs on a GPU, as far as a CPU can tell: FlexAttention's plain form, which has no gradient there."""

    @pytest.mark.parametrize("length", [128, 256, 640, 1024])
    @pytest.mark.parametrize("window", [None, 128, 256, 512, 2048])
    def test_blocks_are_those_of_torch(self, length, window):
        def visible(b, h, q, k):
            return (q >= k) & (q - k < (window or length))

        ours = flex.band(length, window, torch.device("cpu"))
        same_blocks(ours, create_block_mask(visible, None, None, length, length, "cpu"))

    @pytest.mark.parametrize(("length", "window"), [(128, 128), (512, 128), (512, 384), (640, 640)])
    def test_with_a_window_before_the_queries_too(self, length, window):
        def visible(b, h, q, k):
            return (q + window >= k) & (q + window - k < window)

        ours = flex.band(length, window, torch.device("cpu"), follows=True)
        same_blocks(ours, create_block_mask(visible, None, None, length, window + length, "cpu"))

    @pytest.mark.parametrize("held", [(0,), (3,), (0, 3), (1, 2)])
    @pytest.mark.parametrize("length", [128, 200, 255, 384])
    def test_from_chunks_of_any_length_too(self, length, held):
        """From 200 rows a chunk the queries are filled up, and their blocks begin in the middle of a block of keys."""
        padded, seq_len = length + -length % 128, 4 * length + -4 * length % 128
        position = torch.cat([chunk * length + torch.arange(padded) for chunk in held])

        def visible(b, h, q, k):
            return position[q] >= k

        ours = flex.band_from_chunks(length, held, seq_len, torch.device("cpu"))
        same_blocks(ours, create_block_mask(visible, None, None, len(position), seq_len, "cpu"))

    @pytest.mark.parametrize("window", [None, 128])
    def test_it_equals_plain_attention(self, window):
        rows = qkv(300, heads=4, groups=2, dtype=torch.float32)
        compiled = torch.compile(flex.attend, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for got, want in zip(compiled(*rows, window), parts.attend_plainly(*rows, window), strict=True):
                torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("case", ["all follow", "all start", "every second starts", "from chunks"])
    def test_it_equals_plain_attention_in_chunks(self, case):
        """On a GPU with gradients, through the log-sum-exps too; a CPU has no compiled backward."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if case == "from chunks":
            fused, plain = flex.attend_from_chunks, parts.attend_plainly_from_chunks
            tensors = qkv(1200, heads=4, groups=2, head_dim=32, dtype=torch.float32)
            tensors[0] = tensors[0][:, :, :600]
        else:
            fused, plain = flex.attend, parts.attend_plainly
            rows, before = (qkv(n, heads=4, groups=2, head_dim=32, batch=4, dtype=torch.float32) for n in (300, 128))
            tensors = [*rows, *before[1:]]

        def call(attend, tensors):
            if case == "from chunks":
                return attend(*tensors, (1, 2))
            starts_every = {"all follow": 0, "all start": 1, "every second starts": 2}[case]
            return attend(*tensors[:3], 128, tensors[3:], starts_every)

        exact = [x.double().to(device).requires_grad_() for x in tensors]
        expected = call(plain, exact)
        ours = [x.to(device).requires_grad_(device == "cuda") for x in tensors]
        backend = "inductor" if device == "cuda" else "aot_eager"
        got = call(torch.compile(fused, fullgraph=True, backend=backend), ours)
        # Sums of up to 1,200 products in float32.
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        for one, want in zip(got, expected, strict=True):
            close(one.double(), want)
        if device == "cuda":
            weights = [torch.cos(torch.arange(x.numel(), device=device).view_as(x)) for x in expected]
            grads = (
                torch.autograd.grad(
                    [(x * w).sum() for x, w in zip(out, weights, strict=True)], inputs, materialize_grads=True
                )  # before starts nothing counts
                for out, inputs in ((got, ours), (expected, exact))
            )
            for one, want in zip(*grads, strict=True):
                close(one.double(), want)


def test_plain_attention_has_the_gradients_of_its_definition():
    """Through its rows and its log-sum-exps, in blocks, against finite differences."""
    rows = [x.requires_grad_() for x in qkv(20, heads=2, groups=1, head_dim=2)]
    torch.autograd.gradcheck(lambda *x: parts.attend_plainly(*x, 8), rows, fast_mode=True)
    out, sums = parts.attend_plainly(*rows, 8)
    assert out.shape == (1, 2, 20, 2)
    query, key = (x.detach()[0, head] for x, head in zip(rows, (1, 0), strict=False))
    expected = torch.stack([(key[max(0, t - 7) : t + 1] @ query[t] / 2**0.5).exp().sum().log() for t in range(20)])
    torch.testing.assert_close(sums[0, 1], expected)


@pytest.mark.parametrize("window", [None, 96, 512])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
class TestParts:
    """What takes the place of FlexAttention where nothing is split: the kernels of a GPU, plain PyTorch on a CPU."""

    @staticmethod
    def rows(dtype, heads, groups):
        """Query, key, value and two gradients in one dtype, on a device that takes it."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and dtype not in (torch.bfloat16, torch.float16):
            pytest.skip("for FlexAttention")
        rows = [x.to(device) for x in qkv(320, heads=heads, groups=groups, head_dim=32, batch=2, dtype=dtype)]
        grad = random_rows(2, heads, 320, 32, seed=9, dtype=dtype, device=device)
        assert parts.takes(rows[0])
        return rows, grad, random_rows(2, heads, 320, seed=10, dtype=torch.float64, device=device)

    def test_rows_and_log_sum_exps(self, dtype, heads, groups, window):
        rows, *_ = self.rows(dtype, heads, groups)
        exact = parts.attend_plainly(*(x.double() for x in rows), window)
        out, sums = parts.attend(*rows, window)
        assert out.dtype == dtype and sums.dtype == torch.promote_types(dtype, torch.float32)
        eps = torch.finfo(dtype).eps
        # Weights and rows are rounded.
        torch.testing.assert_close(out.double(), exact[0], rtol=8 * eps, atol=2 * eps * rows[2].abs().max().item())
        torch.testing.assert_close(sums.double(), exact[1], rtol=0, atol=64 * torch.finfo(sums.dtype).eps)

    def test_a_gradient_of_log_sum_exps_goes_in_by_other_rows(self, dtype, heads, groups, window):
        """Instead of the rows, others whose product with the gradient is smaller by that of the log-sum-exp. They are
        rounded, and with them a part of the gradients: what ``out`` adds. In float32 scores have roundings, too."""
        rows, grad, sums_grad = self.rows(dtype, heads, groups)
        wide = [x.double().requires_grad_() for x in rows]
        exact, exact_sums = parts.attend_plainly(*wide, window)
        expected = torch.autograd.grad([exact, exact_sums], wide, [grad.double(), sums_grad])
        wide, exact, exact_sums = [x.detach() for x in wide], exact.detach(), exact_sums.detach()
        product = (exact * grad).sum(-1) - sums_grad
        other = product[..., None] * grad.double() / grad.double().square().sum(-1, keepdim=True)
        sums = parts.attend(*rows, window)[1]
        got = parts.differentiate(grad, *rows, other.to(dtype), sums, window)
        without = parts.differentiate_plainly(grad.double(), *wide, 0 * exact, exact_sums, window)
        for ours, want, less in zip(got, expected, without, strict=True):
            assert ours.dtype == dtype
            size = want.norm() + (want - less).norm()
            roundings = 2 if dtype in (torch.bfloat16, torch.float16) else 8
            assert (ours.double() - want).norm() <= roundings * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_torch_has_the_attentions_of_a_gpu(window, strict, monkeypatch):
    """Their signatures, by their forms without data. What they return is stored as the operators announce."""
    query, key = (torch.empty(2, 256, n, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for n in (4, 2))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    real = parts.attend(query, key, key, window)
    grads = parts.differentiate(real[0], query, key, key, *real, window)
    monkeypatch.undo()
    fake = kernels.attend_short(query, key, key) if window is None else kernels.attend_window(query, key, key, window)
    fake = [*fake, *kernels.attend_backward(query, query, key, key, query, fake[1], window)]
    for ours, announced in zip((*real, *grads), fake, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (announced.shape, announced.dtype, announced.stride())


def test_without_cudnn_it_is_the_same(on, monkeypatch):
    monkeypatch.setattr(parts, "BY_CUDNN", False)
    config, _ = make(256, 2, 2, 128, combine="softmax", local_window=128, backend=on["backend"])
    compare(qkv(256, heads=4, groups=2, head_dim=8), config, on)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_full_length_on_a_gpu(window):
    """98,304 tokens in bfloat16, forward and backward, against the same layer in float32. Nothing of S² scores."""
    config = LighthouseConfig(combine="softmax", local_window=window, selection="causal")
    inputs = qkv(98304, heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    grad = random_rows(1, 8, 98304, 128, seed=9, dtype=torch.bfloat16, device="cuda")
    low = run(*inputs, config, grad)
    exact = run(*(x.float() for x in inputs), config, grad.float())
    for got, want in zip(low, exact, strict=True):
        assert (got.float() - want).norm() <= 8 * torch.finfo(torch.bfloat16).eps * want.norm()
