"""The Triton twins of the plain-torch functions, as registered operators; each module names its specification.

Every operator writes every element of its outputs, uses no atomics, does not synchronise with the host, and gives the
same bits for the same inputs. Tensors may have any strides as long as rows are contiguous.

Importing this package imports Triton: ``lighthouse.backend.load_kernels`` does it where kernels are used.
"""

import torch

from lighthouse.kernels.gather_scatter import gather, gather_backward, scatter, scatter_backward
from lighthouse.kernels.scorers import norm_scores
from lighthouse.kernels.selection import order_entries, pick_parents

#: What selective activation checkpointing should keep: the selection and the gathered rows. Both are small, and with
#: them the backward needs neither scores nor query, key and value again.
WORTH_SAVING = {torch.ops.lighthouse.order_entries.default, torch.ops.lighthouse.gather.default}

__all__ = [
    "WORTH_SAVING",
    "gather",
    "gather_backward",
    "norm_scores",
    "order_entries",
    "pick_parents",
    "scatter",
    "scatter_backward",
]
