"""A sequence in chunks against the whole, in one process; tests/torchtitan runs it on ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from helpers.cases import make, qkv, random_rows, run
from lighthouse import (
    LighthouseConfig,
    SequenceShards,
    ShardedLighthouseAttention,
    causal_attention,
    lighthouse_attention,
    select,
)
from lighthouse.attention import gather, scatter
from lighthouse.context_parallel import halo_of, last_rows
from lighthouse.local_window import attend_locally


def stack(rows, num_chunks):
    return rows.unflatten(2, (num_chunks, -1)).transpose(1, 2).flatten(0, 1)


def join(chunks, num_chunks):
    return chunks.unflatten(0, (-1, num_chunks)).transpose(1, 2).flatten(2, 3)


def in_chunks(query, key, value, config, num_chunks=4, with_halo=True):
    """What ``context_parallel_attention`` computes, with all chunks here and each chunk's halo given to the next."""
    chunks = [stack(rows, num_chunks) for rows in (query, key, value)]
    local, chunk_len = config.of_chunk(num_chunks), query.shape[2] // num_chunks
    backend = config.resolve_backend(query.device.type)
    selection = select(*chunks[:2], local, starts_every=num_chunks)
    short = [join(gather(rows, selection, local, backend), num_chunks) for rows in chunks]
    before = last_rows(*chunks[1:], local.local_window).unflatten(0, (-1, num_chunks))
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=1).flatten(0, 1).chunk(2, dim=-1)
    near = attend_locally(*chunks, local.local_window, before=before, starts_every=num_chunks)
    out = stack(causal_attention(*short, enable_gqa=query.shape[1] != key.shape[1]), num_chunks)
    made = halo_of(out, selection, chunk_len, local).unflatten(0, (-1, num_chunks))
    halo = torch.cat([torch.zeros_like(made[:, :1]), made[:, :-1]], dim=1).flatten(0, 1)
    return join(scatter(out, selection, chunk_len, local, backend, halo if with_halo else None, near), num_chunks)


@pytest.mark.parametrize(
    ("geometry", "groups", "batch"),
    [((2048, 3, 2, 512), 2, 1), ((2048, 2, 2, 512), 1, 2)],
)
def test_chunks_equal_the_whole_sequence(geometry, groups, batch, on):
    """Output and gradients in float64; the rows after every border are wrong without the halo."""
    config, seq_len = make(
        *geometry, backend=on["backend"], selection="causal" if groups == 2 else "delayed", local_window=128 * groups
    )
    inputs = [x.to(on["device"]) for x in qkv(seq_len, heads=2, groups=groups, head_dim=8, batch=batch)]
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64).to(on["device"])
    whole, parts = run(*inputs, config, grad, lighthouse_attention), run(*inputs, config, grad, in_chunks)
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        without = in_chunks(*inputs, replace(config, backend="torch"), with_halo=False)
        error = (without - whole[0]).abs().amax(dim=(0, 1, 3)).view(4, -1)
    reach = config.pooling_factor ** (config.num_levels - 1) - 1
    assert (error[1:, :reach] > 1e-3).any(dim=1).all(), "the test does not see the halo"
    assert error[0].max() < 1e-10 and error[:, reach:].max() < 1e-10


MERGED = {"combine": "softmax"}


@pytest.fixture
def alone():
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("load_balanced", [True, False], ids=["two chunks", "one chunk"])
@pytest.mark.parametrize(
    "more",
    [{"local_window": 256}, {"selection": "none", "local_window": 256}, MERGED | {"local_window": 256}, MERGED],
    ids=["sum", "window alone", "softmax", "softmax, no window"],
)
def test_one_rank_equals_one_device_and_resolves_the_backend_once(more, load_balanced, alone, monkeypatch):
    config, seq_len = make(1024, 3, 2, 256, **{"selection": "causal"} | more)
    inputs = qkv(seq_len, groups=1, head_dim=8, batch=2)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64)
    expected = run(*inputs, config, grad)
    layer = ShardedLighthouseAttention(config, causal_attention, SequenceShards(alone, load_balanced))
    resolve, resolved = LighthouseConfig.resolve_backend, []

    def spy(config, device_type):
        resolved.append(resolve(config, device_type))
        return resolved[-1]

    monkeypatch.setattr(LighthouseConfig, "resolve_backend", spy)
    ours = run(*inputs, config, grad, lambda *rows: layer(*rows[:3], enable_gqa=True))
    assert resolved == ["torch"]
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_one_rank_selects_by_the_rows_that_it_is_given_for_it(alone):
    config, seq_len = make(2048, 2, 2, 512)
    inputs = qkv(seq_len, groups=1, head_dim=8, batch=2)
    scored = tuple(random_rows(*rows.shape, seed=7, dtype=torch.float64) for rows in inputs[:2])
    expected = lighthouse_attention(*inputs, config, score_by=scored)
    assert not torch.allclose(expected, lighthouse_attention(*inputs, config)), "the test does not see the selection"
    layer = ShardedLighthouseAttention(config, causal_attention, SequenceShards(alone, load_balanced=True))
    ours = layer(*inputs, enable_gqa=True, score_by=scored)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_an_attention_over_all_ranks_is_asked_for_where_one_is_used(alone):
    shards = SequenceShards(alone)
    with pytest.raises(ValueError, match=r"attention=None: combine='sum' needs .*: ring attention \(or combine="):
        ShardedLighthouseAttention(LighthouseConfig(), None, shards)
    with pytest.raises(ValueError, match=r"attention='flash': combine='sum' needs .*: ring attention \(or combine="):
        ShardedLighthouseAttention(LighthouseConfig(), "flash", shards)  # one device's
    with pytest.raises(ValueError, match=r"attention=Identity.*'softmax' needs log-sum-exps.*: None"):
        ShardedLighthouseAttention(LighthouseConfig(**MERGED), torch.nn.Identity(), shards)
    ShardedLighthouseAttention(LighthouseConfig(**MERGED), None, shards)


def test_a_layer_with_merged_parts_compiles_into_one_graph(alone):
    """Exchanges included. In float32, where torch 2.11 gets a cast wrong that does nothing."""
    config, seq_len = make(1024, 3, 2, 256, **MERGED, local_window=128)
    inputs = qkv(seq_len, groups=1, head_dim=8, dtype=torch.float32)
    grad = random_rows(*inputs[0].shape, seed=9)
    layer = ShardedLighthouseAttention(config, None, SequenceShards(alone))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, expected = (
        run(*inputs, config, grad, lambda q, k, v, _, layer=layer: layer(q, k, v, enable_gqa=True))
        for layer in (compiled, layer)
    )
    for got, want in zip(ours, expected, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)
