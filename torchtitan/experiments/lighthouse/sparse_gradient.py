"""The gradient of the loss in the probable columns of the vocabulary alone: ``training.sparse_loss_gradient``.

The gradient of a row's loss in its logits is its probabilities, less 1 at the label. Where the data uses a part of the
vocabulary, nearly all of it is almost zero: a byte tokenizer has 258 tokens, Llama 3's vocabulary 128,256 columns. Two
of the three products of the output layer are spent on those zeros.

Here the logits of a chunk of rows are read once, in blocks of ``BLOCK`` columns. For each block there is the row in
which it is most probable. Blocks without a label are left out of the chunk's gradient, the least probable first, as
long as these largest probabilities add up to no more than u, the rounding of the logits' dtype: 2^-8 for bfloat16.

So what is left out of a row sums to at most u, as much as the rounding of its probabilities may amount to. The gradient
of a row in its hidden state changes by at most u max|w|, over the rows w of the weight, and that of the weight by at
most T u max|h| in all columns together, over T hidden states h. Rows labelled ``IGNORE_INDEX`` do not count. The loss
itself leaves nothing out.

The limit is on the sum. A limit on each column alone does not suffice: 2^-12, for example, with which Cut Cross-Entropy
filters gradients (arXiv 2411.09009), is above 1/128,256, the probability of every column of new weights. Columns that
the data never uses would never be pushed down. Here new weights count as a whole, and unused columns are pushed down
until they are negligible together. No further: they may keep up to u of a row's probability, which is 0.004 nats of
loss in bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

#: Columns that are taken or left out together. Those after the last whole block are always taken.
BLOCK = 128


class SparseGradient:
    """Decides what of a chunk's gradient there is, and counts it.

    Args:
        backend: the compiler's; None: nothing is compiled.
    """

    def __init__(self, backend: str | None = None) -> None:
        self._measure, self._gradient = measure, gradient_in
        if backend is not None:
            self._measure = torch.compile(measure, backend=backend)
            # Any number of columns with one compilation.
            self._gradient = torch.compile(gradient_in, backend=backend, dynamic=True)
        self._taken = self._all = 0

    def of_chunk(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The loss of a chunk, and its gradient in the columns that are not negligible.

        The host waits for the device here, once, to know how many columns they are.

        Args:
            logits: [R, V].
            labels: [R] int64.

        Returns:
            The summed loss; the gradient, [R, C] in the logits' dtype; and its columns, [C] int64, each once. None
            where more than half of the blocks would be taken: then it is for the caller to compute it whole.
        """
        loss, log_total, largest = self._measure(logits, labels)
        vocabulary, blocks = logits.shape[1], len(largest)
        sizes, order = largest.sort(stable=True)
        active = blocks - int((sizes.logcumsumexp(0) <= math.log(rounding(logits.dtype))).sum())
        self._all += vocabulary
        if active > blocks // 2:
            self._taken += vocabulary
            return None
        # Powers of two, so that there are few shapes. Filled up with the most probable ones of the others.
        size = min(2 ** max(active - 1, 0).bit_length(), blocks // 2)
        taken = order[blocks - size :]
        columns = torch.arange(blocks * BLOCK, vocabulary, device=logits.device)
        columns = torch.cat([(taken[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(), columns])
        self._taken += len(columns)
        return loss, self._gradient(logits, labels, log_total, columns), columns

    def share(self) -> float:
        """Of the columns, those that had a gradient: the mean of all chunks since the last call, 1 where none was."""
        share = self._taken / self._all if self._all else 1.0
        self._taken = self._all = 0
        return share


def rounding(dtype: torch.dtype) -> float:
    """By how much rounding to this dtype changes a number, at most, as a share of it."""
    return torch.finfo(dtype).eps / 2


def measure(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the logits.

    Args:
        logits: [R, V].
        labels: [R] int64.

    Returns:
        The summed cross-entropy; each row's log-sum-exp, [R]; and for each whole block of columns the logarithm of its
        probability in the row that counts where this is largest, 0 where it holds a label, [V // BLOCK]. All in
        float32 (float64 for float64 logits).
    """
    wide, counts = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels != IGNORE_INDEX
    whole = logits.shape[1] // BLOCK * BLOCK
    blocks = wide[:, :whole].unflatten(1, (-1, BLOCK)).logsumexp(-1)
    log_total = blocks.logsumexp(-1)
    if whole < logits.shape[1]:
        log_total = torch.logaddexp(log_total, wide[:, whole:].logsumexp(-1))
    label = labels.clamp(min=0)
    loss = (log_total - wide.gather(1, label[:, None])[:, 0]).where(counts, 0).sum()
    holds_label = torch.arange(blocks.shape[1], device=logits.device) == (label // BLOCK)[:, None]
    probability = (blocks - log_total[:, None]).where(~holds_label, 0).where(counts[:, None], -torch.inf)
    return loss, log_total, probability.amax(0)


def gradient_in(logits: Tensor, labels: Tensor, log_total: Tensor, columns: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy in some columns, [C] int64, of the logits: [R, C] in their dtype."""
    probability = (logits[:, columns].to(log_total.dtype) - log_total[:, None]).exp()
    hit = columns == labels[:, None]
    grad = (probability - hit.to(probability.dtype)).where((labels != IGNORE_INDEX)[:, None], 0)
    return grad.to(logits.dtype)
