#!/usr/bin/env python
"""How much of what the scorer ``norm`` selects is chance, in models that normalise queries and keys and in others.

    python studies/query_key_norm.py --steps 60

trains small models of a few families densely, on the source code of Python's standard library, and looks at all their
queries and keys, before and after the norm that Qwen3 and OLMo2 have. Two figures of the scores:

* spread: their standard deviation over their mean.
* chance: what rounding decides. The rows are rounded to bfloat16, as in training, and selected from again. If a of the
  entries of level 0 are selected both times, and r of them by two random scores, it is (1 − a) / (1 − r): 0 where the
  scores decide everything, 1 where a random score would do as well.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from lighthouse import LighthouseConfig, causal_attention, select
from lighthouse.integrations import query_key_norm

FAMILIES = ("Llama", "Qwen3", "Olmo2")
GEOMETRY = LighthouseConfig(top_k=128, backend="torch")


class Looking:
    """Dense attention that remembers its queries and keys, and what they were before a norm."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"after": [], "before": []}

    def scores_before_norm(self, module: nn.Module) -> bool:
        return True

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object):
        before = query_key_norm.rows_before(module, query, key)
        self.seen["after"].append((query.detach(), key.detach()))
        if before is not None:
            self.seen["before"].append(before)
        output = causal_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        return output.transpose(1, 2).contiguous(), None


def selected(query: Tensor, key: Tensor) -> Tensor:
    """[B, G, N] bool: which entries of level 0 are."""
    return select(query, key, GEOMETRY).inverse_map[..., : query.shape[2]] >= 0


def shared(one: Tensor, other: Tensor) -> float:
    return ((one & other).sum() / one.sum()).item()


def figures(rows: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Spread and chance, means over the layers."""
    spreads, chances = [], []
    for query, key in rows:
        norms = query.norm(dim=-1)
        spreads.append((norms.std(-1) / norms.mean(-1)).mean().item())
        random = [selected(torch.rand_like(query), torch.rand_like(key)) for _ in range(2)]
        agreed = shared(selected(query, key), selected(query.bfloat16(), key.bfloat16()))
        chances.append((1 - agreed) / (1 - shared(*random)))
    return sum(spreads) / len(spreads), sum(chances) / len(chances)


def sequences(context: int) -> Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return text[: len(text) // context * context].view(-1, context).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    text = sequences(options.context)
    for family in FAMILIES:
        config = getattr(transformers, f"{family}Config")(
            vocab_size=256, hidden_size=options.width, intermediate_size=3 * options.width,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 32,
            num_key_value_heads=max(1, options.width // 64), head_dim=32, max_position_embeddings=options.context,
            initializer_range=options.width**-0.5, use_cache=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(options.steps + 1):
            if step in (0, options.steps):
                looking = Looking()
                transformers.AttentionInterface.register("looking", looking)
                model.set_attn_implementation("looking")
                query_key_norm.keep_rows(model.config)
                with torch.no_grad():
                    loss = model(text[-1:], labels=text[-1:]).loss
                model.set_attn_implementation("sdpa")
                for place, rows in looking.seen.items():
                    if rows:
                        spread, chance = figures(rows)
                        print(f"| {family} | {step} | {loss:.2f} | {place} | {spread:.1%} | {chance:.1%} |", flush=True)
            batch = text[step % (len(text) - 1)][None]
            model(batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
