"""One sequence split over several ranks, without a trainer: forward and gradients are those of one device.

    torchrun --nproc_per_node 2 examples/context_parallel.py                    # gloo on a CPU, NCCL on GPUs
    torchrun --nproc_per_node 2 examples/context_parallel.py --context 131072   # more of the sequence on each rank

Every rank computes the layer on the whole sequence and on its own share of it, compares the two there and prints the
largest differences. If one of them is more than rounding, the program fails.

Lighthouse selects, gathers and scatters on each rank's own chunks and hands the few rows that reach past a chunk to the
next one. Only its inner attention sees other ranks' rows. Here that is ``gathered_attention``, which collects all keys
and values and forms a mask: short, and too large for long sequences. A real run uses ring attention, torch's context
parallelism, as the trainer of this repository does (docs/context_parallel.md).
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lighthouse import LighthouseAttention, LighthouseConfig, SequenceShards, ShardedLighthouseAttention

BATCH, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 1, 4, 2, 16


def positions(rank: int, world_size: int, length: int) -> Tensor:
    """Which rows of a sequence of ``length`` a rank holds: of 2W equal chunks the r-th and, after it, the r-th last.

    The last chunk costs causal attention most, the first least: every such pair costs the same. It is the layout that
    ``SequenceShards`` assumes, and torch's ring attention. A model gives its rotary embedding these positions.
    """
    chunks = torch.arange(length).chunk(2 * world_size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


class AllGather(torch.autograd.Function):
    """[…] on each rank to [W, …] on all of them, differentiable."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every rank's queries attended to this rank's rows, and each has its part of their gradient.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
    """Causal attention over the sequence that all ranks hold together, for this rank's queries.

    Args:
        query: [B, H, S/W, D], the rank's two chunks one after the other.
        key, value: [B, G, S/W, D].
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # [W, B, G, S/W, D] to [B, G, S, D], in the order of the ranks: attention does not care about the order of its keys,
    # as long as the mask knows it.
    key, value = (AllGather.apply(rows.contiguous()).movedim(0, 2).flatten(2, 3) for rows in (key, value))
    length = key.shape[2]
    # Lighthouse selects equally many rows in every chunk, in the order of the sequence. So the gathered rows are again
    # a sequence, split as the tokens are: a query sees the rows that stand before its own place in it.
    of_queries = positions(rank, world_size, length)
    of_keys = torch.cat([positions(other, world_size, length) for other in range(world_size)])
    mask = (of_queries[:, None] >= of_keys).to(query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)


def output_and_gradients(layer: LighthouseAttention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [rows.clone().requires_grad_() for rows in inputs]
    output = layer(*leaves, enable_gqa=True)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, help="tokens; default: 8192 for each rank")
    parser.add_argument("--top-k", type=int, help="a multiple of 256 for each rank; default: 256 for each")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    context = args.context or 8192 * world_size
    config = LighthouseConfig(top_k=args.top_k or 256 * world_size)
    whole = LighthouseAttention(config)
    split = ShardedLighthouseAttention(config, gathered_attention, SequenceShards(dist.group.WORLD))

    # The same numbers on every rank; a real run only ever holds its own rows.
    generator = torch.Generator().manual_seed(0)
    *inputs, grad = (
        torch.randn(BATCH, heads, context, HEAD_DIM, generator=generator).to(device)
        for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS)
    )
    own = positions(rank, world_size, context).to(device)
    expected = [rows[:, :, own] for rows in output_and_gradients(whole, inputs, grad)]
    results = output_and_gradients(split, [rows[:, :, own] for rows in inputs], grad[:, :, own])
    dist.destroy_process_group()

    # The two sum the same float32 products, up to S of them, in different orders: rounding errors, each of up to half
    # an eps, add up like a random walk of S steps.
    rows = config.selected_length(context)
    tolerance = torch.finfo(torch.float32).eps * rows**0.5
    lines, equal = [], True
    for name, got, want in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
        difference, allowed = (got - want).abs().max().item(), tolerance * want.abs().max().item()
        equal &= difference <= allowed
        lines.append(f"{name:>8}: largest difference {difference:.1e}, allowed {allowed:.1e}")
    verdict = "equal to" if equal else "DIFFERENT from"
    lines.insert(0, f"rank {rank} of {world_size}, {context} tokens through {rows} rows: {verdict} one device's result")
    print("\n".join(lines), flush=True)  # in one piece: all ranks print at the same time
    return equal


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
