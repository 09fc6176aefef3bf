"""Both stages of Lighthouse in one plain PyTorch loop: a small GPT on the bytes of the standard library, or of a file.

    python examples/train_gpt.py
    python examples/train_gpt.py --context 98304 --top-k 1536 --width 768 --layers 12 --heads 6 --lr 1e-3 --steps 90 45

The second is for a GPU; on a CPU that others use too, set OMP_WAIT_POLICY=passive. Stage 2 goes on with the same
weights and optimizer: only the attention changes, and with it the tokens per second. The loss of Stage 1 is not
comparable with a dense one (README.md, Limits).
"""

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighthouse import LighthouseAttention, LighthouseConfig, causal_attention


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.lighthouse = heads, None  # None: dense
        self.norm1, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = self.lighthouse or causal_attention
        x = x + self.out(attention(rotary(query), rotary(key), value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotary(rows: Tensor) -> Tensor:
    """[B, H, N, D], pairs of columns turned by angles that grow with the position."""
    length, half, device = rows.shape[2], rows.shape[3] // 2, rows.device
    angles = torch.arange(length, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, half, device=device)
    (a, b), cos, sin = rows.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(rows)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, help="any file; default: the modules of the standard library")
parser.add_argument("--steps", type=int, nargs=2, default=[16, 6], metavar=("STAGE1", "STAGE2"))
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
for name, default in {"context": 12288, "top-k": 128, "width": 64, "layers": 6, "heads": 2, "lr": 5e-3}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
args = parser.parse_args()
torch.manual_seed(0)
files = [args.text] if args.text else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
blocks = [Block(args.width, args.heads) for _ in range(args.layers)]
model = nn.Sequential(nn.Embedding(256, args.width), *blocks, nn.RMSNorm(args.width), nn.Linear(args.width, 256))
optimizer, total = torch.optim.AdamW(model.to(args.device).parameters(), args.lr), sum(args.steps)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)  # warm-up, then constant
lighthouse, losses, speeds = LighthouseAttention(LighthouseConfig(top_k=args.top_k)), {1: [], 2: []}, {1: [], 2: []}
for step in range(total):
    stage = 1 if step < args.steps[0] else 2
    for block in blocks[1:-1]:  # the first and the last layer are dense in both stages
        block.lighthouse = lighthouse if stage == 1 else None  # no parameters in it: weights and optimizer stay
    start, first = time.perf_counter(), int(torch.randint(len(text) - args.context, ()))
    tokens = text[first : first + args.context + 1].to(args.device, torch.long)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        loss = F.cross_entropy(model(tokens[None, :-1])[0].float(), tokens[1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    loss = loss.item()  # waits for the device, so that the time is that of the whole step
    speed = args.context / (time.perf_counter() - start)
    losses[stage].append(loss)
    speeds[stage].append(speed)
    print(f"step {step + 1} of {total}, stage {stage}: loss {loss:.3f}, {speed:,.0f} tokens/s", flush=True)
for stage in filter(losses.get, losses):  # the stages that had any step
    loss, speed = statistics.mean(losses[stage][-4:]), statistics.median(speeds[stage])
    print(f"stage {stage}: loss {losses[stage][0]:.3f}, over its last 4 steps {loss:.3f}; {speed:,.0f} tokens/s")
