"""The Triton twins of the plain-torch functions, as registered operators; each module names its specification.

Every operator writes every element of its outputs, uses no atomics, does not synchronise with the host, and gives the
same bits for the same inputs. Tensors may have any strides as long as rows are contiguous. A layer calls three:
``select_by_norms``, ``gather_three`` and ``scatter``.

Importing this package imports Triton: ``lighthouse.backend.load_kernels`` does it where kernels are used.
"""

from lighthouse.kernels.operators import (
    gather,
    gather_backward,
    gather_three,
    gather_three_backward,
    scatter,
    scatter_backward,
    select_by_norms,
    select_by_scores,
)

#: What selective activation checkpointing should keep: the selection and the gathered rows. Both are small, and with
#: them the backward needs neither scores nor query, key and value again.
WORTH_SAVING = {select_by_norms, select_by_scores, gather, gather_three}

__all__ = [
    "WORTH_SAVING",
    "gather",
    "gather_backward",
    "gather_three",
    "gather_three_backward",
    "scatter",
    "scatter_backward",
    "select_by_norms",
    "select_by_scores",
]
