"""Each kernel against its plain-torch twin in float64; on a GPU where there is one, else through the interpreter.

That everything is written shows because uninitialised memory is poisoned (conftest).
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from helpers.cases import make, random_rows
from lighthouse import gather_scatter, kernels, lighthouse_attention, merging, select
from lighthouse.gather_scatter import entries_over
from lighthouse.kernels.common import launch
from lighthouse.kernels.scorers import norm_scores as norm_scores_kernel
from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets, pool_scores
from lighthouse.scorers import norm_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"

#: seq_len, num_levels, pooling_factor, top_k: small windows, two passes of pooling (p = 16), many levels.
GEOMETRIES = [(1024, 2, 4, 256), (3072, 3, 2, 384), (2048, 2, 16, 128), (32768, 3, 16, 128), (4096, 6, 2, 128)]


def selection_of(geometry, groups=1, batch=1):
    config, seq_len = make(*geometry, backend="torch")
    query, key = (random_rows(batch, groups, seq_len, 2, seed=s) for s in (0, 1))
    chosen = select(query, key, config)
    return config, seq_len, *(x.to(DEVICE) for x in (chosen.entry, chosen.inverse_map))


def error_allowed(exact, magnitude, dtype):
    """One rounding to ``dtype`` (the interpreter truncates to bfloat16) and 16 float32 roundings of the terms."""
    ulp = torch.finfo(dtype).eps * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
    wide = torch.finfo(torch.float64).eps if dtype == torch.float64 else 2**-24
    return ulp * exact.abs() + 16 * wide * magnitude + torch.finfo(dtype).tiny


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float32, 8), (torch.bfloat16, 32), (torch.float16, 80), (torch.bfloat16, 96), (torch.float64, 16),
        *[pytest.param(*case, marks=pytest.mark.gpu) for case in ((torch.bfloat16, 128), (torch.float16, 256))],
        pytest.param(torch.float32, 64, marks=pytest.mark.gpu),
    ],
)  # fmt: skip
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_move_as_in_plain_torch(geometry, dtype, head_dim):
    """All four operators, and what two of them may add; grouped heads; [B, N, H, D] in memory."""
    groups, heads = 2, 4
    if INTERPRETED:  # slow: the other dtypes on the smallest geometry only, and rows just long enough to be masked
        if (geometry[0] > 1024 and dtype != torch.float32) or head_dim in (64, 128, 256):
            pytest.skip("on a GPU only")
        groups, heads, head_dim = (2, 4, min(head_dim, 12)) if geometry[0] < 4096 else (1, 1, 3)
    config, seq_len, entry, inverse_map = selection_of(geometry, groups)
    shape, selected = (config.num_levels, config.pooling_factor), entry.shape[-1]
    long = random_rows(1, seq_len, heads, head_dim, seed=2, dtype=dtype, device=DEVICE).transpose(1, 2)
    short = random_rows(1, selected, heads, head_dim, seed=3, dtype=dtype, device=DEVICE).transpose(1, 2)
    added = random_rows(1, seq_len, heads, head_dim, seed=4, dtype=dtype, device=DEVICE).transpose(1, 2)
    for name, rows, arguments in (
        ("gather", long, (entry, inverse_map, *shape)),
        ("gather_backward", short, (inverse_map, seq_len, *shape)),
        ("gather_backward", short, (inverse_map, seq_len, *shape, added)),
        ("scatter", short, (entry, inverse_map, seq_len, *shape)),
        ("scatter", short, (entry, inverse_map, seq_len, *shape, None, added)),
        ("scatter_backward", long, (entry, inverse_map, *shape)),
    ):
        plain = getattr(gather_scatter, name)
        ours = getattr(kernels, name)(rows, *arguments)
        wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
        sizes = [x.abs() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in wide]
        exact, magnitude = plain(rows.double(), *wide), plain(rows.double().abs(), *sizes)
        assert ours.dtype == dtype, name
        assert ((ours.double() - exact).abs() <= error_allowed(exact, magnitude, dtype)).all(), name


@pytest.mark.parametrize(
    ("seq_len", "num_levels", "pooling_factor", "heads", "groups"),
    [(192, 3, 2, 2, 2), (192, 3, 2, 4, 2), (512, 3, 16, 3, 1)],
)
def test_three_in_one_launch_are_as_one_by_one(seq_len, num_levels, pooling_factor, heads, groups):
    """Query, key and value, in memory each in its own way, to the bit, and so their gradients. p = 16: two passes."""
    entries, batch, selected = sum(level_lengths(seq_len, num_levels, pooling_factor)), 2, 96
    chosen = torch.rand(batch, groups, entries, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :selected]
    slots = torch.arange(selected, dtype=torch.int32).expand(chosen.shape)
    inverse_map = torch.full((batch, groups, entries), -1, dtype=torch.int32).scatter(-1, chosen, slots).to(DEVICE)
    entry, shape = chosen.int().to(DEVICE), (num_levels, pooling_factor)
    wide = random_rows(batch, seq_len, heads + groups, 5, seed=2, device=DEVICE).transpose(1, 2)
    rows = [wide[:, :heads], wide[:, heads:], random_rows(batch, groups, seq_len, 5, seed=3, device=DEVICE)]
    leaves = [x.detach().requires_grad_() for x in rows]
    wide = random_rows(batch, selected, heads + groups, 5, seed=4, device=DEVICE).transpose(1, 2)
    grads = [wide[:, :heads], random_rows(batch, groups, selected, 5, seed=5, device=DEVICE), wide[:, heads:]]
    together = kernels.gather_three(*leaves, entry, inverse_map, *shape)
    long_grads = torch.autograd.grad(together, leaves, grads)
    sums = kernels.gather_three_backward(*grads, inverse_map, seq_len, *shape, tuple(rows))
    for grad, other, total in zip(grads, rows, sums, strict=True):
        assert torch.equal(total, kernels.gather_backward(grad, inverse_map, seq_len, *shape, other))
    for x, short, grad, long_grad in zip(rows, together, grads, long_grads, strict=True):
        assert torch.equal(short, kernels.gather(x, entry, inverse_map, *shape))
        torch.testing.assert_close(short, gather_scatter.gather(x, entry, inverse_map, *shape))
        assert torch.equal(long_grad, kernels.gather_backward(grad, inverse_map, seq_len, *shape))


def test_a_kernel_is_compiled_again_for_whatever_triton_specialises_it_on():
    """Numbers, constants, dtypes, warps, and where rows begin; for the same again it is launched as it was compiled."""
    compiled, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: (compiled.append((grid, arguments, options)), Compiled())[1]

    kernel, rows = Kernel(), torch.zeros(8)
    for _ in range(2):
        launch(kernel, 3, (rows, rows), (16, 2), CONSTANT=True)
    (first,) = compiled
    assert first[0] == (3, 1, 1) and first[1][2:] == (16, 2) and first[2] == {"CONSTANT": True, "num_warps": 4}
    assert launched[0][0] == (3, 1, 1) and launched[0][1][2:] == (16, 2, True)
    launch(kernel, 5, (rows + 1, rows), (16, 2), across=2, CONSTANT=True)
    assert len(compiled) == 1 and launched[1][0] == (5, 2, 1)
    launch(kernel, 3, (rows, rows), (17, 2), CONSTANT=True)
    launch(kernel, 3, (rows, rows), (16, 2), CONSTANT=False)
    launch(kernel, 3, (rows, rows.double()), (16, 2), CONSTANT=True)
    launch(kernel, 3, (rows, rows), (16, 2), num_warps=8, CONSTANT=True)
    launch(Kernel(), 3, (rows, rows), (16, 2), CONSTANT=True)
    for _ in range(2):  # rows that begin anywhere are left to Triton every time
        launch(kernel, 3, (rows[1:], rows), (16, 2), CONSTANT=True)
    assert len(compiled) == 8 and len(launched) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_begin_anywhere_in_memory(dtype):
    """After aligned ones, for which a kernel loads 16 bytes at once."""
    config, seq_len, entry, inverse_map = selection_of((1024, 2, 4, 128))
    shape = (config.num_levels, config.pooling_factor)
    aligned = random_rows(1, 1, seq_len, 16, dtype=dtype, device=DEVICE)
    shifted = torch.zeros(aligned.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(aligned.shape).copy_(aligned)
    assert aligned.data_ptr() % 16 == 0 != shifted.data_ptr() % 16
    for _ in range(2):
        want, got = (kernels.gather(rows, entry, inverse_map, *shape) for rows in (aligned, shifted))
        assert torch.equal(got, want)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_backward_is_the_transpose_of_its_forward(geometry):
    """⟨gather(x), y⟩ = ⟨x, gather_backward(y)⟩ in float64, and so for scatter."""
    config, seq_len, entry, inverse_map = selection_of(geometry)
    shape = (config.num_levels, config.pooling_factor)
    long = random_rows(1, 1, seq_len, 4, seed=2, dtype=torch.float64, device=DEVICE)
    short = random_rows(1, 1, entry.shape[-1], 4, seed=3, dtype=torch.float64, device=DEVICE)
    for forward, x, backward, y in (
        (
            kernels.gather(long, entry, inverse_map, *shape), long,
            kernels.gather_backward(short, inverse_map, seq_len, *shape), short,
        ),
        (
            kernels.scatter(short, entry, inverse_map, seq_len, *shape), short,
            kernels.scatter_backward(long, entry, inverse_map, *shape), long,
        ),
    ):  # fmt: skip
        torch.testing.assert_close((forward * y).sum(), (x * backward).sum(), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 20), (torch.bfloat16, 64), (torch.float64, 8)])
@pytest.mark.parametrize("pooling_factor", [2, 4, 8, 16])
def test_scores(pooling_factor, dtype, head_dim):
    query = random_rows(2, 1024, 6, head_dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    key = random_rows(2, 1024, 2, head_dim, seed=1, dtype=dtype, device=DEVICE).transpose(1, 2)
    config, _ = make(1024, 2, pooling_factor, 128)
    exact = norm_scores(query.double(), key.double(), None, config)
    # A sum of head_dim squares and a root in float32.
    rtol = head_dim * (2**-53 if dtype == torch.float64 else 2**-24)
    inverse_map = torch.zeros(2, 2, 1024 + 1024 // pooling_factor, dtype=torch.int32, device=DEVICE)
    for ours, want in zip(norm_scores_kernel(query, key, pooling_factor, inverse_map), exact, strict=True):
        torch.testing.assert_close(ours.double(), pool_scores(want, 2, pooling_factor)[1], rtol=rtol, atol=0)
    assert (inverse_map == -1).all()


def test_a_very_wide_tile_still_finds_its_parents():
    """One tile of 8,192 candidates, nearly all equal. (The interpreter takes long for more than 4,096.)"""
    lengths = {"published": 8192, "causal": 2048} if INTERPRETED else {"published": 16384, "causal": 16384}
    for selection, seq_len in lengths.items():
        levels = torch.randint(1, 3, (2, 1, 1, seq_len, 1), generator=torch.Generator().manual_seed(0)).float()
        config, _ = make(seq_len, 2, 2, 128, selection=selection, backend="torch")
        expected = select(*levels, config)
        got = select(*levels.to(DEVICE), replace(config, backend="triton"))
        assert torch.equal(got.entry.cpu(), expected.entry)


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seq_len", "num_levels", "pooling_factor", "near"), [(192, 3, 2, True), (272, 2, 16, False)])
def test_merge_and_what_its_backward_hands_on(seq_len, num_levels, pooling_factor, near, dtype, heads):
    """Against ``lighthouse.merging`` in float64, from the same rounded rows. What is handed on for an entry is Σ w·g,
    the gradient of its row, and a row whose product with it is Σ w·g·y, each over the positions that it writes to.

    Few entries: without a window there are positions without any part. Log-sum-exps are up to hundreds apart.
    """
    batch, groups, selected, head_dim = 2, max(1, heads // 2), 48, 12
    shape = (num_levels, pooling_factor)
    offsets = level_offsets(seq_len, *shape)
    chosen = torch.rand(batch, groups, offsets[-1], generator=torch.Generator().manual_seed(0)).argsort(-1)
    entry = chosen[..., :selected].int()
    slots = torch.arange(selected, dtype=torch.int32).expand(entry.shape)
    inverse_map = torch.full(chosen.shape, -1, dtype=torch.int32).scatter(-1, entry.long(), slots).to(DEVICE)
    level = torch.searchsorted(torch.tensor(offsets), entry, right=True) - 1
    level, entry = level.to(torch.int8).to(DEVICE), entry.to(DEVICE)
    wide = accumulation_dtype(dtype)
    rows, long, grad = (
        random_rows(batch, n, heads, head_dim, seed=seed, dtype=dtype, device=DEVICE).transpose(1, 2)
        for n, seed in ((selected, 1), (seq_len, 2), (seq_len, 3))
    )
    sums, long_sums = (100 * random_rows(*x.shape[:3], seed=4, dtype=wide, device=DEVICE) for x in (rows, long))
    part = (long, long_sums) if near else (None, None)
    result, whole = kernels.merge(rows, sums, *part, inverse_map, seq_len, *shape)

    leaf = rows.double().requires_grad_()
    maps = (level, entry, inverse_map)

    def merged(values, others):
        beside = (others, long_sums.double()) if near else None
        return merging._merge((values, sums.double()), beside, None, maps, (seq_len, *shape), False)

    exact = merged(leaf, long.double())
    magnitude = merged(rows.double().abs(), long.double().abs())
    # A weight's logarithm has a rounding of the log-sum-exps, which are up to 400.
    slack = 400 * (2**-53 if dtype == torch.float64 else 2**-24)
    assert result.dtype == dtype and whole.dtype == wide and result.transpose(1, 2).is_contiguous()
    error = (result.double() - exact.detach()).abs()
    assert (error <= error_allowed(exact.detach(), magnitude, dtype) + slack * magnitude).all()
    if not near:
        empty = entries_over(inverse_map, seq_len, *shape, written=True)
        empty = torch.stack([slot < 0 for _, slot in empty]).all(0).repeat_interleave(heads // groups, dim=1)
        assert empty.any() and not result[empty].any() and (whole[empty] == -torch.inf).all()

    def summed(values):  # over the positions that an entry writes to, by its weights
        return torch.autograd.grad(exact, leaf, values, retain_graph=True)[0]

    pooled, other = kernels.merge_backward(grad, result, whole, sums, entry, *shape)
    assert pooled.dtype == other.dtype == dtype and pooled.is_contiguous() and other.is_contiguous()
    size = summed(grad.double().abs())
    error = (pooled.double() - summed(grad.double())).abs()
    assert (error <= error_allowed(summed(grad.double()), size, dtype) + slack * size).all()
    product, size = (summed(x).sum(-1) for x in (grad.double() * result, (grad.double() * result).abs()))
    error = ((pooled.double() * other).sum(-1) - product).abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= error_allowed(product, size, dtype) + slack * size + smallest * pooled.abs().sum(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_other_row_of_gradients_of_any_size(dtype):
    """Gradients whose squares overflow or vanish; two that nearly cancel, so that their product with y is large beside
    their sum; zero; and in float16 a row that would be larger than any number."""
    size = 1e-4 if dtype == torch.float16 else 1e-30
    direction = random_rows(1, 1, 1, 8, seed=1, device=DEVICE).sign()
    one, below, zero = direction, -(1 - 2**-7) * direction, 0 * direction
    pairs = [(one, one), (one, below), (zero, zero)]
    merged = torch.cat([direction, -direction], dim=2).repeat(1, 1, 3, 1).to(dtype)
    entry = torch.tensor([[[8, 9, 10]]], dtype=torch.int32, device=DEVICE)  # level 1, p = 2: positions 1 to 6
    sums, whole = torch.zeros(1, 1, 3, device=DEVICE), torch.zeros(1, 1, 8, device=DEVICE)
    result = torch.nn.functional.pad(merged, (0, 0, 1, 1))
    for scale in (1.0, size, 1 / size):
        grad = torch.nn.functional.pad(scale * torch.cat([x for pair in pairs for x in pair], dim=2), (0, 0, 1, 1))
        pooled, other = kernels.merge_backward(grad.to(dtype), result, whole, sums, entry, 2, 2)
        product = (pooled.double() * other.double()).sum(-1)[0, 0]
        exact = (grad.to(dtype).double() * result).sum(-1)[0, 0, 1:7].unflatten(0, (3, 2)).sum(-1)
        torch.testing.assert_close(product, exact, rtol=torch.finfo(dtype).eps, atol=1e-6 * abs(exact[1].item()))
        assert pooled[0, 0, :2].all() and not other[0, 0, 2].any()
    if dtype == torch.float16:
        grad[:, :, 3], grad[:, :, 4] = 1e4, -1e4 + 8
        result[:, :, 3], result[:, :, 4] = 6e4, -6e4
        _, other = kernels.merge_backward(grad.to(dtype), result, whole, sums, entry, 2, 2)
        assert other.isfinite().all() and other[0, 0, 1].max() == torch.finfo(dtype).max


def test_operators_are_registered_properly():
    """Fake implementations agree with the real ones in shape, dtype and strides; nothing is aliased or mutated."""
    config, seq_len, entry, inverse_map = selection_of((256, 2, 2, 128))
    shape = (config.num_levels, config.pooling_factor)
    query = random_rows(1, seq_len, 2, 8, device=DEVICE).transpose(1, 2)
    key = random_rows(1, seq_len, 1, 8, seed=1, device=DEVICE).transpose(1, 2)
    short = random_rows(1, 2, entry.shape[-1], 8, device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in (query, key, key)]
    short_key = random_rows(1, 1, entry.shape[-1], 8, seed=1, device=DEVICE)
    scores = random_rows(2, 1, 1, seq_len // 2, device=DEVICE).abs()
    sums, whole = (random_rows(*x.shape[:3], device=DEVICE) for x in (short, query))
    # A GPU's attentions take no float32.
    rows = [x if INTERPRETED else x.bfloat16() for x in (query, key, short, short_key)]
    scatter = torch.ops.lighthouse.scatter.default
    gather_three_backward = torch.ops.lighthouse.gather_three_backward.default
    for operator, arguments in (
        (kernels.select_by_norms, (query, key, *shape, config.num_tiles, 1, False, False)),
        (kernels.select_by_scores, (*scores, *shape, config.num_tiles, 1, True, True)),
        (kernels.gather, (leaves[0], entry, inverse_map, *shape)),
        (torch.ops.lighthouse.gather_backward.default, (short, inverse_map, seq_len, *shape, query)),
        (kernels.gather_three, (*leaves, entry, inverse_map, *shape)),
        (gather_three_backward, (short, short_key, short_key, inverse_map, seq_len, *shape, None, None, None)),
        (gather_three_backward, (short, short_key, short_key, inverse_map, seq_len, *shape, query, key, key)),
        (scatter, (short.clone().requires_grad_(), inverse_map, seq_len, *shape, None, None)),
        (scatter, (short, inverse_map, seq_len, *shape, None, leaves[0])),
        (torch.ops.lighthouse.scatter_backward.default, (query, inverse_map, entry.shape[-1], *shape)),
        (kernels.attend_short, (rows[2], rows[3], rows[3])),
        (kernels.attend_window, (rows[0], rows[1], rows[1], 128)),
        (kernels.attend_backward, (rows[2], rows[2], rows[3], rows[3], rows[2], sums, None)),
        (kernels.attend_backward, (rows[0], rows[0], rows[1], rows[1], rows[0], whole, 128)),
        (kernels.merge, (short, sums, query, whole, inverse_map, seq_len, *shape)),
        (kernels.merge_backward, (query, query, whole, sums, entry, *shape)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no GPU")
def test_offsets_past_32_bits():
    """B·H·N·D > 2³¹ elements, and S past 65,535."""
    config, seq_len = make(524288, 3, 4, 4096, backend="triton")
    long = torch.randn(1, 40, seq_len, 128, device="cuda", dtype=torch.bfloat16)
    assert long.numel() > 2**31
    chosen = select(long, long, config)
    assert chosen.entry.shape[-1] == 65536
    shape, maps = (config.num_levels, config.pooling_factor), (chosen.entry, chosen.inverse_map)
    last_maps = [x[:, -1:] for x in maps]
    gathered = kernels.gather(long, *maps, *shape)
    last = gather_scatter.gather(long[:, -1:], *last_maps, *shape)
    torch.testing.assert_close(gathered[:, -1:], last, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    scattered = kernels.scatter(gathered, *maps, seq_len, *shape)
    last = gather_scatter.scatter(gathered[:, -1:], *last_maps, seq_len, *shape)
    torch.testing.assert_close(scattered[:, -1:], last, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("groups", [8, 2])
def test_only_selected_rows_are_kept_for_the_backward(groups):
    """Between forward and backward: gathered rows, the inner attention's output and row sums, and the selection.

    Nothing has N rows of D, although N is eight times S here; query, key and value may be freed.
    """
    config, seq_len = make(32768, 3, 4, 256, backend="triton")
    selected, heads, head_dim = config.selected_length(seq_len), 8, 128
    leaves = [
        torch.randn(1, seq_len, n, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, groups, groups)
    ]

    def forward():
        return lighthouse_attention(*(2 * leaf.transpose(1, 2) for leaf in leaves), config)

    forward()  # what libraries allocate once
    before = torch.cuda.memory_allocated()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    rows_kept = selected * head_dim * 2 * (2 * heads + 2 * groups)
    entries = sum(level_lengths(seq_len, config.num_levels, config.pooling_factor))
    assert 0 < kept <= rows_kept + 4 * heads * selected + groups * (9 * selected + 4 * entries) + 2**20
    assert kept < out.numel() * out.element_size()  # less than one tensor of N rows
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("groups", [4, 2])
def test_forward_and_backward_run_as_a_cuda_graph(groups):
    """Nothing synchronises and no shape depends on data: a captured layer follows new inputs, to the bit."""
    config, seq_len = make(8192, 3, 4, 128, backend="triton")
    inputs, others = (
        [
            random_rows(1, seq_len, n, 64, seed=s + offset, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for s, n in enumerate((4, groups, groups))
        ]
        for offset in (0, 10)
    )
    inputs = [x.requires_grad_() for x in inputs]
    grad = random_rows(1, 4, seq_len, 64, seed=20, dtype=torch.bfloat16, device="cuda")

    def both_ways(rows):
        out = lighthouse_attention(*rows, config)
        return [out.detach(), *torch.autograd.grad(out, rows, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both_ways(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(inputs)
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    for got, want in zip(captured, both_ways([x.requires_grad_() for x in others]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("combine", "window"), [("sum", 0), ("sum", 128), ("softmax", 128)])
@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
def test_compiled_checkpointing_keeps_what_it_is_told(selective, combine, window):
    """Fully checkpointed, only the input: the partitioner keeps no operator's result. Selectively, the gathered rows
    and the selection, as ``WORTH_SAVING`` says, and nothing N-sized beside the input. With ``softmax`` the rows of the
    short attention and their log-sum-exps, too."""
    config, seq_len = make(512, 3, 2, 128, backend="triton", local_window=window, combine=combine)
    # On a GPU cuDNN and Flash, whose rows are kept, take no float32.
    made = {"device": DEVICE, "dtype": torch.bfloat16 if DEVICE == "cuda" else torch.float32}
    project = torch.nn.Linear(16, 16, bias=False, **made)

    def layer(x):
        heads = project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return project(lighthouse_attention(heads, 2 * heads, 3 * heads, config).transpose(1, 2).flatten(2))

    contexts = {}
    if selective:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, list(kernels.WORTH_SAVING))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False, **contexts), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(1, seq_len, 16, **made, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = compiled(x)
    # Beside it the weight, and the generator's state that SDPA's dropout would need.
    columns = 3 * 16 + (16 + 2 if combine == "softmax" else 0)
    gathered = columns * config.selected_length(seq_len)
    least, most = (gathered, gathered) if selective else (0, 0)
    if window and torch.__version__ < "2.12":
        # Compiling an autograd.Function, it forgets what is to be computed again: as if selectively, and with softmax
        # three log-sum-exps of each position.
        most = gathered + (3 * 2 * seq_len if combine == "softmax" else 0)
    floats = sum(t.numel() for t in kept if t.is_floating_point())
    assert least <= floats <= x.numel() + 2 * project.weight.numel() + most
    (ours,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    # bfloat16 rounds each of some ten steps by up to 2^-9, and cuDNN adds up in any order.
    close = {"rtol": 0.0, "atol": 0.02 * plain.abs().max().item()} if DEVICE == "cuda" else {}
    torch.testing.assert_close(ours, plain, **close)
