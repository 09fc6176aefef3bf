"""Triton twins of the plain-torch stages, as registered operators; each file names its specification.

Every operator writes every element of its outputs, uses no atomics, does not synchronise with the host, and gives the
same bits for the same inputs. Tensors may have any strides as long as rows are contiguous.
"""

from lighthouse.kernels.rows import pool_rows, spread_rows
from lighthouse.kernels.scores import norm_scores
from lighthouse.kernels.selection import order_entries, pick_parents

__all__ = ["norm_scores", "order_entries", "pick_parents", "pool_rows", "spread_rows"]
