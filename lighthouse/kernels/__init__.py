"""Triton twins of the plain-torch stages, as registered operators; each file names its specification.

Every operator writes every element of its outputs, uses no atomics, does not synchronise with the host, and gives the
same bits for the same inputs. Tensors may have any strides as long as rows are contiguous.
"""

import torch

from lighthouse.kernels.rows import pool_rows, spread_rows
from lighthouse.kernels.scores import norm_scores
from lighthouse.kernels.selection import order_entries, pick_parents

#: What selective activation checkpointing should keep: the selection and the gathered rows. Both are small, and with
#: them the backward needs neither scores nor query, key and value again.
WORTH_SAVING = {torch.ops.lighthouse.order_entries.default, torch.ops.lighthouse.pool_rows.default}

__all__ = ["WORTH_SAVING", "norm_scores", "order_entries", "pick_parents", "pool_rows", "spread_rows"]
