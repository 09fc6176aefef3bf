"""Which attention kernels upstream's layers may take."""

from typing import cast

from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse.inner_attention import BY_NAME, SDPA_BACKENDS


class PackageAttention(nn.Module):
    """Causal attention by a package, in the place of upstream's module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
        return BY_NAME[self.name](query, key, value, enable_gqa=enable_gqa)

    def extra_repr(self) -> str:
        return self.name


def by_kernels(module: nn.Module, name: str) -> nn.Module:
    """Upstream's attention module, with the kernels of ``lighthouse.inner_attention`` and no others.

    Where they are torch's it stays the module that context parallelism turns into ring attention.
    """
    if name == "auto":
        return module
    if name not in SDPA_BACKENDS:
        return PackageAttention(name)
    cast(ScaledDotProductAttentionWrapper, module).sdpa_backends = [SDPA_BACKENDS[name]]
    return module


def take_float32(model: nn.Module) -> None:
    """Give dense attention a kernel that takes float32 on a GPU.

    Upstream's are cuDNN and Flash, which do not. Without another one torch would make the matrix of all N² scores,
    309 GB a layer at 98,304 tokens and 8 heads.
    """
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            module.sdpa_backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
