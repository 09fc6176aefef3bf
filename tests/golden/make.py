"""Writes the golden vectors beside this file, with the float64 reference (tests/helpers/reference.py):

    PYTHONPATH=tests .venv/bin/python tests/golden/make.py

Needed only when a case is added: the method does not change, and neither do the files. The same numpy writes the same
bytes. A file holds, for one batch entry,

- the settings of ``LighthouseConfig`` by name, and ``denominator``;
- ``query``, ``grad`` [H, N, D] and ``key``, ``value`` [G, N, D] as int8, to be divided by ``denominator``;
- ``level``, ``index`` [G, S]: the selected entries of every key/value head, in sequence order;
- ``output`` [H, N, D] and the gradients ``query_grad``, ``key_grad``, ``value_grad`` of Σ output · grad, rounded once
  from float64 to float32.

Inputs are whole numbers over a power of two, so that a squared norm is the same in every precision (bfloat16 included)
and in every order of summation: the selection leaves nothing to rounding, and equal norms are exactly equal.
"""

from pathlib import Path

import numpy as np
import torch

from helpers.reference import attend_naively, select_naively
from lighthouse import LighthouseConfig

FOLDER = Path(__file__).parent

#: name: ((heads, groups, seq_len, head_dim), denominator, settings)
CASES = {
    # So coarse a grid that many norms are equal: the lower index wins.
    "l2_p4_ties": ((1, 1, 640, 4), 1, {"num_levels": 2, "pooling_factor": 4, "top_k": 128}),
    "l3_p2_grouped": ((2, 1, 640, 2), 32, {"num_levels": 3, "pooling_factor": 2, "top_k": 128}),
    "l3_p4": ((1, 1, 2048, 2), 32, {"num_levels": 3, "pooling_factor": 4, "top_k": 128}),
    "l4_p2_authors": (
        (1, 1, 1280, 2), 32, {"num_levels": 4, "pooling_factor": 2, "top_k": 128, "cover_start": False},
    ),
    "l3_p2_delayed": (
        (1, 1, 1280, 2), 32, {"num_levels": 3, "pooling_factor": 2, "top_k": 256, "selection": "delayed"},
    ),
    "l3_p2_causal_window": (
        (2, 1, 1280, 2), 32,
        {"num_levels": 3, "pooling_factor": 2, "top_k": 256, "selection": "causal", "local_window": 128},
    ),
}  # fmt: skip


def make(shape: tuple[int, int, int, int], denominator: int, settings: dict, seed: int) -> dict[str, np.ndarray]:
    heads, groups, seq_len, head_dim = shape
    config = LighthouseConfig(**settings)
    config.validate(seq_len)
    generator = np.random.default_rng(seed)

    def draw(rows: int) -> np.ndarray:
        drawn = generator.standard_normal((rows, seq_len, head_dim)) * denominator
        return drawn.round().clip(-127, 127).astype(np.int8)

    stored = {"query": draw(heads), "key": draw(groups), "value": draw(groups), "grad": draw(heads)}
    query, key, value, grad = (torch.from_numpy(x).double() / denominator for x in stored.values())
    per_group = heads // groups
    query_score = query.norm(dim=-1).unflatten(0, (groups, per_group)).amax(1)
    selected = [select_naively(query_score[g], key[g].norm(dim=-1), config) for g in range(groups)]

    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = torch.stack(
        [
            attend_naively(query[h], key[g], value[g], selected[g], config.pooling_factor, window=config.local_window)
            for h, g in ((h, h // per_group) for h in range(heads))
        ]
    )
    gradients = torch.autograd.grad(output, leaves, grad)
    entries = np.array(selected)
    stored |= {"level": entries[..., 0].astype(np.int8), "index": entries[..., 1].astype(np.int16)}
    results = dict(zip(("output", "query_grad", "key_grad", "value_grad"), (output, *gradients), strict=True))
    stored |= {name: x.detach().numpy().astype(np.float32) for name, x in results.items()}
    return stored | {name: np.array(x) for name, x in {"denominator": denominator, **settings}.items()}


def main() -> None:
    for seed, (name, case) in enumerate(CASES.items()):
        np.savez_compressed(FOLDER / f"{name}.npz", **make(*case, seed=seed))


if __name__ == "__main__":
    main()
