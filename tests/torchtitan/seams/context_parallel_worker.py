"""One rank of ``test_context_parallel.py``: a layer on a split sequence against the layer on one device.

Over gloo on CPU, or by torchrun over NCCL on GPUs, with the dtype as argument.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial

from torchtitan.experiments.lighthouse.seams.context_parallel import support_ring_on_cpu
from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator

use_cpu_without_accelerator()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor.experimental._attention import set_rotate_method  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module, cp_shard  # noqa: E402
from torchtitan.models.attention import ScaledDotProductAttentionWrapper  # noqa: E402

from lighthouse import (  # noqa: E402
    LighthouseConfig,
    SequenceShards,
    ShardedLighthouseAttention,
    lighthouse_attention,
    select,
)

#: Eight tiles of 256 entries, so that every chunk of four balanced ranks has one.
PUBLISHED = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=1024)
WINDOWED = replace(PUBLISHED, selection="causal", local_window=256)
HEAD_DIM = 16


@dataclass
class Case:
    groups: int
    balanced: bool
    rotation: str
    config: LighthouseConfig
    batch: int = 2
    heads: int = 4
    seq_len: int = 8192


def cases(world_size):
    """Every pair of settings; and parts merged as one softmax, which keeps all scores on a CPU: in small, and without
    a rotation."""
    merged = {"combine": "softmax", "top_k": 256 * world_size}
    small = 1024 * world_size
    return [
        Case(4, True, "alltoall", PUBLISHED),
        Case(4, False, "allgather", WINDOWED),
        Case(2, True, "allgather", WINDOWED),
        Case(2, False, "alltoall", PUBLISHED),
        Case(1, False, "allgather", replace(PUBLISHED, **merged), heads=1, seq_len=small),
        Case(1, True, "allgather", replace(WINDOWED, **merged), heads=2, batch=1, seq_len=small),
    ]


def results(layer, query, key, value, grad):
    """Output and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = layer(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def of_rank_0(shapes, compute):
    """Tensors of these shapes that one rank computes for all."""
    found = [x.contiguous() for x in (compute() if dist.get_rank() == 0 else map(torch.empty_like, shapes))]
    for x in found:
        dist.broadcast(x, 0)
    return found


def shard(rows, mesh, balanced):
    """[B, H, N, D] to this rank's [B, H, N/W, D], by torchtitan, which also tells torch's ring the layout."""
    (own,), _ = cp_shard(mesh, (rows,), None, "headtail" if balanced else None, input_seq_dim=2)
    return own


def turn(angles, rows, position):
    """Rows [B, H, S, D] of two columns a pair, turned by angles [n, D/2] at positions [B, G, S]."""
    angle = angles[position].repeat_interleave(rows.shape[1] // position.shape[1], dim=1)
    x, y = rows.float().chunk(2, dim=-1)
    turned = torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
    return turned.to(rows.dtype)


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    if not on_gpu:
        support_ring_on_cpu()
    ring, plain = ScaledDotProductAttentionWrapper(), ScaledDotProductAttentionWrapper()
    if on_gpu and dtype == torch.float32:
        ring.sdpa_backends = plain.sdpa_backends = [SDPBackend.EFFICIENT_ATTENTION]  # the others are for 16 bits
    apply_cp_to_attention_module([ring], mesh, "sdpa")

    generator = torch.Generator().manual_seed(0)
    for case in cases(dist.get_world_size()):
        groups, heads, balanced, config = case.groups, case.heads, case.balanced, case.config
        window, merged = config.local_window, config.combine == "softmax"
        kind = f"{'head-tail' if balanced else 'contiguous'}, {'softmax' if merged else case.rotation}"
        where = f"{groups} key/value heads, {kind}, window {window}, rank {dist.get_rank()}"
        # Positions at a chunk's start that the chunk before it writes to, or that attend to it.
        reach = max(config.pooling_factor ** (config.num_levels - 1), window) - 1
        set_rotate_method(case.rotation)
        query, key, value, grad = (
            torch.randn(case.batch, number, case.seq_len, HEAD_DIM, generator=generator).to(device, dtype)
            for number in (heads, groups, groups, heads)
        )
        inputs = (query, key, value, grad)
        own = [shard(rows, mesh, balanced) for rows in inputs]
        shards = SequenceShards(mesh.get_group(), load_balanced=balanced)
        over_ranks = None if merged else ring
        layer = ShardedLighthouseAttention(config, over_ranks, shards)

        # Ungrouped heads are selected by other rows than those that attend.
        by = own_by = None
        if groups == heads:
            by = tuple(torch.randn(query.shape, generator=generator).to(device, dtype) for _ in range(2))
            own_by = tuple(shard(rows, mesh, balanced) for rows in by)
            assert not torch.equal(select(*by, config).index, select(query, key, config).index), where
        check_selection(by or (query, key), own_by or own[:2], shards, config, where)
        # Grouped heads are also rotated after the gather, by angles that are sharded as the rows are.
        rotate = own_rotate = None
        if groups != heads:
            angles = torch.arange(case.seq_len)[:, None] * 0.5 ** torch.arange(1, HEAD_DIM // 2 + 1)
            angles = angles[None, None].to(device)
            rotate, own_rotate = (partial(turn, rows[0, 0]) for rows in (angles, shard(angles, mesh, balanced)))
        exact = [x.float() for x in inputs]
        whole = partial(lighthouse_attention, config=config, rotate=rotate, score_by=by)
        expected = one_device = of_rank_0([exact[0], *exact[:3]], partial(results, whole, *exact))
        if dtype != torch.float32:
            one_device = results(partial(whole, attention=None if merged else plain), *inputs)
        # Selected from rounded rows in both: float32 copies of them have the same norms.
        how = {"enable_gqa": groups != heads, "rotate": own_rotate, "score_by": own_by}
        ours = results(partial(layer, **how), *own)
        for name, got, want, single in zip(("output", "dq", "dk", "dv"), ours, expected, one_device, strict=True):
            want, single = shard(want, mesh, balanced), shard(single, mesh, balanced)
            scale = want.abs().max()
            if dtype == torch.float32:
                assert (got - want).abs().max() <= 1e-5 * scale, f"{where}: {name}"
                borders = shards.stack((got - want).abs())[:, :, :reach]
                assert borders.max() <= 1e-5 * scale, f"{where}: {name} at the chunks' borders"
            else:
                error, allowed = ((x.float() - want).norm() / want.norm() for x in (got, single))
                # Ring attention rounds its output once more, and a halo row's gradient is rounded on its way.
                eps = torch.finfo(dtype).eps
                assert error <= allowed + eps, f"{where}: {name} {error:.2e}, one device {allowed:.2e}"

        if dist.get_rank() == 0 and dtype != torch.float32:
            print(f"{where}: {name} off by {error:.2e}, one device by {allowed:.2e}", flush=True)

        without = ShardedLighthouseAttention(config, over_ranks, WithoutHalo(mesh.get_group(), load_balanced=balanced))
        out = without(*own[:3], **how)
        missing = shards.stack((out.float() - shard(expected[0], mesh, balanced)).abs())
        starts = shards.starts_every == 1 and dist.get_rank() == 0  # this rank holds nothing but the sequence's start
        assert starts or missing[:, :, :reach].max() > 0.01, f"{where}: the test does not see the halo"
        assert missing[:, :, reach:].max() < (1e-4 if dtype == torch.float32 else 0.2), where
    dist.destroy_process_group()


class WithoutHalo(SequenceShards):
    def pass_halo_on(self, halo):
        return torch.zeros_like(halo)


def check_selection(scored, own_scored, shards, config, where):
    """The rank's chunks select what one device selects in these chunks."""
    whole = select(*scored, config)
    chunks = [shards.stack(rows) for rows in own_scored]
    local = select(*chunks, config.of_chunk(shards.num_chunks), starts_every=shards.starts_every)
    rank, size = dist.get_rank(), dist.get_world_size()
    held = (rank, 2 * size - 1 - rank) if shards.load_balanced else (rank,)
    share = whole.level.shape[-1] // shards.num_chunks
    for nth, chunk in enumerate(held):
        part = slice(chunk * share, (chunk + 1) * share)
        level = whole.level[..., part]
        first = chunk * (scored[0].shape[2] // shards.num_chunks) // config.pooling_factor ** level.long()
        assert torch.equal(local.level[nth :: shards.held], level), where
        assert torch.equal(local.index[nth :: shards.held] + first, whole.index[..., part]), where


main()
