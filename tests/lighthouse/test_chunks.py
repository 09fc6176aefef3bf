"""A sequence in chunks against the whole, in one process; ``tests/torchtitan/test_context_parallel.py`` has ranks."""

import pytest
import torch
from test_attention import qkv, run
from test_selection import make, random_rows

from lighthouse import causal_attention, lighthouse_attention, select
from lighthouse.attention import pool_and_gather, scatter_back
from lighthouse.context_parallel import last_rows


def stack(rows, num_chunks):
    return rows.unflatten(2, (num_chunks, -1)).transpose(1, 2).flatten(0, 1)


def join(chunks, num_chunks):
    return chunks.unflatten(0, (-1, num_chunks)).transpose(1, 2).flatten(2, 3)


def in_chunks(query, key, value, config, num_chunks=4, with_spill=True):
    """What ``context_parallel_attention`` computes, with all chunks here and the spill shifted by one."""
    chunks = [stack(rows, num_chunks) for rows in (query, key, value)]
    local, chunk_len = config.of_chunk(num_chunks), query.shape[2] // num_chunks
    selection = select(*chunks[:2], local, cover_every=num_chunks)
    short = [join(pool_and_gather(rows, selection, local), num_chunks) for rows in chunks]
    out = stack(causal_attention(*short, enable_gqa=query.shape[1] != key.shape[1]), num_chunks)
    spill = last_rows(out, selection, chunk_len, local).unflatten(0, (-1, num_chunks))
    halo = torch.cat([torch.zeros_like(spill[:, :1]), spill[:, :-1]], dim=1).flatten(0, 1)
    return join(scatter_back(out, selection, chunk_len, local, halo if with_spill else None), num_chunks)


@pytest.mark.parametrize(
    ("geometry", "groups", "batch"),
    [((4096, 3, 2, 512), 2, 1), ((2048, 2, 2, 512), 1, 2)],
)
def test_chunks_equal_the_whole_sequence(geometry, groups, batch, on):
    """Output and gradients in float64; the rows after every border are wrong without the spill."""
    config, seq_len = make(*geometry, backend=on["backend"], delay_scores=groups == 2)
    inputs = [x.to(on["device"]) for x in qkv(seq_len, heads=2, groups=groups, head_dim=8, batch=batch)]
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.float64).to(on["device"])
    whole, parts = run(*inputs, config, grad, lighthouse_attention), run(*inputs, config, grad, in_chunks)
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        error = (in_chunks(*inputs, config, with_spill=False) - whole[0]).abs().amax(dim=(0, 1, 3)).view(4, -1)
    reach = config.pooling_factor ** (config.num_levels - 1) - 1
    assert (error[1:, :reach] > 1e-3).any(dim=1).all(), "the test does not see the spill"
    assert error[0].max() < 1e-10 and error[:, reach:].max() < 1e-10
