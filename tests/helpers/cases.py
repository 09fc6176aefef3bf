"""What the tests of the library share: geometries, random inputs, and how a layer is run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lighthouse import LighthouseConfig, Selection, lighthouse_attention

GEOMETRIES = [
    # seq_len, num_levels, pooling_factor, top_k
    (1024, 2, 4, 128),
    (1024, 3, 2, 128),
    (2048, 3, 2, 256),
    (2048, 2, 8, 128),
    (4096, 4, 2, 256),
    (4096, 3, 4, 128),
    (6144, 3, 4, 384),
    (4096, 6, 2, 128),
]


def make(seq_len, num_levels, pooling_factor, top_k, **more) -> tuple[LighthouseConfig, int]:
    return LighthouseConfig(num_levels=num_levels, pooling_factor=pooling_factor, top_k=top_k, **more), seq_len


def random_rows(*shape, seed=0, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def qkv(seq_len, heads=2, groups=None, head_dim=16, batch=1, dtype=torch.float64, device="cpu") -> list[Tensor]:
    shapes = [(batch, heads, seq_len, head_dim), *[(batch, groups or heads, seq_len, head_dim)] * 2]
    return [random_rows(*shape, seed=s, dtype=dtype, device=device) for s, shape in enumerate(shapes)]


@contextmanager
def what_is_kept() -> Iterator[dict[int, Tensor]]:
    """The tensors that are kept for a backward, by where they are stored: one of each storage."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def entries(selection: Selection, b: int, g: int) -> list[tuple[int, int]]:
    """(level, index) of each selected entry of one key/value head, in the order of the selection."""
    return list(zip(selection.level[b, g].tolist(), selection.index[b, g].tolist(), strict=True))


def run(query, key, value, config, grad, attention: Callable[..., Tensor] = lighthouse_attention) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, config)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in leaves)]
