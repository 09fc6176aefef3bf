"""The Triton twins of the plain-torch functions, as registered operators; each module names its specification.

Every operator writes every element of its outputs, uses no atomics, does not synchronise with the host, and gives the
same bits for the same inputs. Tensors may have any strides as long as rows are contiguous. A layer calls three:
``select_by_norms``, ``gather_three`` and ``scatter``; with ``combine = "softmax"``, in place of the last,
``attend_short``, ``attend_window`` and ``merge``, whose attention is PyTorch's.

Importing this package imports Triton: ``lighthouse.backend.load_kernels`` does it where kernels are used.
"""

from lighthouse.kernels.operators import (
    attend_backward,
    attend_short,
    attend_window,
    gather,
    gather_backward,
    gather_three,
    gather_three_backward,
    merge,
    merge_backward,
    scatter,
    scatter_backward,
    select_by_norms,
    select_by_scores,
)

#: What selective activation checkpointing should keep: the selection, the gathered rows and what their attention
#: returns. All are small, and with them the backward needs no scores, no query, key and value, and no such attention
#: again.
WORTH_SAVING = {select_by_norms, select_by_scores, gather, gather_three, attend_short}

__all__ = [
    "WORTH_SAVING",
    "attend_backward",
    "attend_short",
    "attend_window",
    "gather",
    "gather_backward",
    "gather_three",
    "gather_three_backward",
    "merge",
    "merge_backward",
    "scatter",
    "scatter_backward",
    "select_by_norms",
    "select_by_scores",
]
