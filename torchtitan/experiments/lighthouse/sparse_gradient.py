"""The gradient of the loss in the probable columns of the vocabulary alone: ``training.sparse_loss_gradient``.

The gradient of a row's loss in its logits is its probabilities, less 1 at the label. Where the data uses a part of the
vocabulary, nearly all of it is almost zero: a byte tokenizer has 258 tokens, Llama 3's vocabulary 128,256 columns. Two
of the three products of the output layer are spent on those zeros.

Here the logits of a chunk of rows are read once, in blocks of ``BLOCK`` columns. Blocks without a label are left out of
the chunk's gradient, the least probable first, as long as they have no more than u/2 of the probability, on average
over the rows. u is the rounding of the logits' dtype, 2^-8 for bfloat16. Rows in which they have more than u, usually
a few in a hundred, leave nothing out; so that these do not decide for all, no row counts for more than u in the average
over all blocks without a label. Rows labelled ``IGNORE_INDEX`` do not count at all.

So what is left out of a row sums to at most u, as much as the rounding of its probabilities may amount to. The gradient
of a row in its hidden state changes by at most u max|w|, over the rows w of the weight, and that of the weight by at
most T u max|h| in all columns together, over T hidden states h. The loss itself leaves nothing out.

The limit is on the sum. A limit on each column alone does not suffice: 2^-12, for example, with which Cut Cross-Entropy
filters gradients (arXiv 2411.09009), is above 1/128,256, the probability of every column of new weights. Columns that
the data never uses would never be pushed down. Here new weights count as a whole, and unused columns are pushed down
until they are negligible together. They may keep up to u of a row's probability, 0.004 nats of loss in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

#: Columns that are taken or left out together. Those after the last whole block are always taken.
BLOCK = 128


@dataclass
class SparseChunk:
    """A chunk's loss and its gradient in the logits, [R, V], as far as there is one; zero elsewhere."""

    loss: Tensor
    """Summed, a scalar"""
    gradient: Tensor
    """[R, C] in the logits' dtype, zero in the rows below"""
    columns: Tensor
    """[C] int64, each once: where that is"""
    whole: Tensor
    """[E, V] in the logits' dtype"""
    rows: Tensor
    """[E] int64, each once: where that is"""

    def backward(self, hidden: Tensor, weight: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> None:
        """Write the gradient of the chunk's hidden states, [R, dim], and add to that of the weight, [V, dim]."""
        torch.mm(self.gradient, weight[self.columns], out=hidden_grad)
        weight_grad.index_add_(0, self.columns, (self.gradient.T @ hidden).to(weight_grad.dtype))
        if len(self.rows):
            hidden_grad[self.rows] = self.whole @ weight
            weight_grad += self.whole.T @ hidden[self.rows]


class SparseGradient:
    """Decides what of a chunk's gradient there is, and counts it.

    Args:
        backend: the compiler's; None: nothing is compiled.
    """

    def __init__(self, backend: str | None = None) -> None:
        self._measure, self._gradient = measure, gradient_in
        if backend is not None:
            self._measure = torch.compile(measure, backend=backend)
            # Any number of rows and columns with one compilation.
            self._gradient = torch.compile(gradient_in, backend=backend, dynamic=True)
        self._taken = self._all = 0

    def of_chunk(self, logits: Tensor, labels: Tensor) -> SparseChunk | None:
        """The loss of a chunk, and its gradient where it is not negligible.

        The host waits for the device here, once, to know how many columns and rows these are.

        Args:
            logits: [R, V].
            labels: [R] int64.

        Returns:
            None where this is more than half of the gradient: then it is for the caller to compute it whole.
        """
        (num_rows, vocabulary), device = logits.shape, logits.device
        limit = rounding(logits.dtype)
        loss, log_total, probability, total = self._measure(logits, labels, limit)
        blocks, counted = len(total), (labels != IGNORE_INDEX).sum()
        ascending, order = total.sort(stable=True)
        # The sums of the least ones, as logarithms: those of numbers have no deterministic kernel.
        left_out = ascending.log().logcumsumexp(0) <= (limit / 2 * counted).log()
        without = (probability * left_out[order.argsort()]).sum(-1)
        taken, exceptions = torch.stack([blocks - left_out.sum(), (without > limit).sum()]).tolist()
        self._all += num_rows * vocabulary
        if taken * num_rows + exceptions * blocks > num_rows * blocks // 2:
            self._taken += num_rows * vocabulary
            return None
        # Powers of two, so that there are few shapes: filled up with what comes next.
        taken, exceptions = (2 ** (n - 1).bit_length() if n else 0 for n in (taken, exceptions))
        blocks_taken = order[blocks - min(taken, blocks) :]
        after = torch.arange(blocks * BLOCK, vocabulary, device=device)
        columns = torch.cat([(blocks_taken[:, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(), after])
        rows = without.sort(descending=True, stable=True).indices[:exceptions]
        others = labels.index_fill(0, rows, IGNORE_INDEX)
        gradient, whole = self._gradient(logits, others, log_total, columns), logits[:0]
        if len(rows):
            everywhere = torch.arange(vocabulary, device=device)
            whole = self._gradient(logits[rows], labels[rows], log_total[rows], everywhere)
        self._taken += len(columns) * (num_rows - len(rows)) + vocabulary * len(rows)
        return SparseChunk(loss, gradient, columns, whole, rows)

    def share(self) -> float:
        """Of the gradient in the logits, the share that was computed since the last call; 1 where none was."""
        share = self._taken / self._all if self._all else 1.0
        self._taken = self._all = 0
        return share


def rounding(dtype: torch.dtype) -> float:
    """By how much rounding to this dtype changes a number, at most, as a share of it."""
    return torch.finfo(dtype).eps / 2


def measure(logits: Tensor, labels: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the logits.

    Args:
        logits: [R, V].
        labels: [R] int64.
        limit: of what a row counts for.

    Returns:
        The summed cross-entropy; each row's log-sum-exp, [R]; its probability in each whole block of columns, 0 where
        it does not count, [R, V // BLOCK]; and the sum over the rows, [V // BLOCK]: R where a block holds a label, and
        elsewhere of no row more than ``limit`` in all blocks together. All in float32 (float64 for float64 logits).
    """
    wide, counts = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels != IGNORE_INDEX
    whole = logits.shape[1] // BLOCK * BLOCK
    blocks = wide[:, :whole].unflatten(1, (-1, BLOCK)).logsumexp(-1)
    log_total = blocks.logsumexp(-1)
    if whole < logits.shape[1]:
        log_total = torch.logaddexp(log_total, wide[:, whole:].logsumexp(-1))
    label = labels.clamp(min=0)
    loss = (log_total - wide.gather(1, label[:, None])[:, 0]).where(counts, 0).sum()
    probability = (blocks - log_total[:, None]).exp().where(counts[:, None], 0)
    holds_label = torch.arange(blocks.shape[1], device=logits.device) == (label // BLOCK)[:, None]
    holds_label = (holds_label & counts[:, None]).any(0)
    unlabelled = probability.where(~holds_label, 0)
    counted_for = (limit / unlabelled.sum(1, keepdim=True).clamp(min=limit)) * unlabelled
    return loss, log_total, probability, counted_for.sum(0).where(~holds_label, float(len(labels)))


def gradient_in(logits: Tensor, labels: Tensor, log_total: Tensor, columns: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy in some columns, [C] int64, of the logits: [R, C] in their dtype."""
    probability = (logits[:, columns].to(log_total.dtype) - log_total[:, None]).exp()
    hit = columns == labels[:, None]
    grad = (probability - hit.to(probability.dtype)).where((labels != IGNORE_INDEX)[:, None], 0)
    return grad.to(logits.dtype)
