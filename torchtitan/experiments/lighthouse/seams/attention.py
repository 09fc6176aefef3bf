"""Which of torch's attention kernels upstream's layers may take."""

from torch import nn
from torch.nn.attention import SDPBackend
from torchtitan.models.attention import ScaledDotProductAttentionWrapper


def take_float32(model: nn.Module) -> None:
    """Give dense attention a kernel that takes float32 on a GPU.

    Upstream's are cuDNN and Flash, which do not. Without another one torch would make the matrix of all N² scores,
    309 GB a layer at 98,304 tokens and 8 heads.
    """
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            module.sdpa_backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
