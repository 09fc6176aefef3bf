"""The loss of the output projection without its logits.

98,304 tokens over 128,256 words are 25 GB of bfloat16 logits, as much again of gradients, and twice that wherever they
are seen as float32. Here logits live a chunk at a time: each chunk is projected, turned into its gradient at once, and
multiplied into the gradients of the hidden states and of the weight. The same products as upstream's, in the same
precision, none of them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchtitan.components.loss import IGNORE_INDEX, LossFunction, build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.sparse_gradient import SparseGradient

#: The setting, by its full name.
SPARSE = "training.sparse_loss_gradient"

#: Logits of one chunk: 8,192 rows of Llama 3's vocabulary, 2 GiB in bfloat16.
CHUNK_LOGITS = 2**30

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Inputs, labels, extra inputs and extra arguments of the model, as upstream's trainer and validator prepare them.
Processed = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]


class OutputProjection(nn.Linear):
    """Upstream's output layer; given labels, it returns the summed cross-entropy instead of the logits."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.of_chunk: ChunkLoss = loss_and_gradient
        #: ``training.sparse_loss_gradient``
        self.sparse: SparseGradient | None = None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, N, dim] to logits [B, N, vocab_size], or, with labels [B, N] int64, to the loss, float32, a scalar."""
        if labels is None:
            if self.sparse is not None and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{SPARSE}=true: this trainer computes the loss outside of the model; start the run with "
                    f"-m torchtitan.experiments.lighthouse.train, or set {SPARSE}=false"
                )
            return super().forward(hidden)
        weight, device = self.weight, hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
        return linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), self.of_chunk, self.sparse)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, of_chunk: ChunkLoss, sparse: SparseGradient | None = None
) -> Tensor:
    """The summed cross-entropy of ``hidden @ weight.T``, differentiable once, in hidden and weight.

    Args:
        hidden: [T, dim].
        weight: [V, dim], of the same dtype.
        labels: [T] int64; positions labelled ``IGNORE_INDEX`` count for nothing.
        of_chunk: ``loss_and_gradient``, as it stands or compiled.
        sparse: leaves out of a chunk's gradient what is negligible, where this is much; None: leaves out nothing.

    Returns:
        A scalar, float32 (float64 for float64 inputs).
    """
    if not torch.is_grad_enabled():
        # ``needs_input_grad`` says what a parameter is, not whether anything is recorded.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, of_chunk, sparse)


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, V] and labels [R] to the summed cross-entropy and its gradient, [R, V] in the logits' dtype."""
    log_probability = logits.to(_at_least_float32(logits.dtype)).log_softmax(-1)
    counts = (labels != IGNORE_INDEX)[:, None]
    label = labels[:, None].clamp(min=0)
    loss = -log_probability.gather(-1, label).where(counts, 0).sum()
    hit = torch.arange(logits.shape[-1], device=logits.device) == label
    grad = (log_probability.exp() - hit.to(log_probability.dtype)).where(counts, 0)
    return loss, grad.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        of_chunk: ChunkLoss,
        sparse: SparseGradient | None,
    ) -> Tensor:
        precise = _at_least_float32(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=precise)
        with_grad = any(ctx.needs_input_grad)
        if with_grad:
            hidden_grad = torch.empty_like(hidden)
            # Summed over chunks in float32: bfloat16 would lose the later ones.
            weight_grad = torch.zeros_like(weight, dtype=precise)
        rows = max(128, CHUNK_LOGITS // weight.shape[0] // 1024 * 1024)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = F.linear(hidden[chunk], weight)
            part = sparse.of_chunk(logits, labels[chunk]) if with_grad and sparse is not None else None
            if part is not None:
                del logits
                part.backward(hidden[chunk], weight, hidden_grad[chunk], weight_grad)
                total += part.loss
                continue
            loss, grad = of_chunk(logits, labels[chunk])
            del logits
            total += loss
            if with_grad:
                torch.mm(grad, weight, out=hidden_grad[chunk])
                weight_grad += grad.T @ hidden[chunk]
            del grad
        if with_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, (weight_grad * grad).to(ctx.weight_dtype), None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def build_loss(job_config: JobConfig, **kwargs: Any) -> LossFunction:
    """Upstream's cross-entropy of logits; a model that was given the labels has computed the loss already."""
    of_logits = build_cross_entropy_loss(job_config, **kwargs)
    return lambda pred, labels: pred if pred.dim() == 0 else of_logits(pred, labels)


def model_takes_labels(parallel_dims: ParallelDims) -> bool:
    """Whether the model computes the loss.

    Tensor parallelism shards the vocabulary and has its own parallel loss; pipeline stages hand on activations only.
    """
    return not (parallel_dims.tp_enabled or parallel_dims.pp_enabled)


def check_sparse_gradient(config: MergedConfig) -> None:
    """Whether the model computes its loss, if it is asked to leave columns out of its gradient.

    Raises:
        Refused: naming the degree that keeps it from doing so, and the nearest valid value.
    """
    if not config.training.sparse_loss_gradient:
        return
    for kind in ("tensor", "pipeline"):
        name = f"{kind}_parallel_degree"
        if (degree := getattr(config.parallelism, name)) > 1:
            raise Refused(
                f"{SPARSE}=true: with parallelism.{name}={degree} the loss is not computed inside of the model; "
                "nearest valid value: false"
            )


def with_labels(processed: Processed, parallel_dims: ParallelDims) -> Processed:
    """What ``post_dataloading_process`` returns, with the labels among the model's arguments if it takes them."""
    _, labels, _, extra_kwargs = processed
    if model_takes_labels(parallel_dims):
        extra_kwargs["labels"] = labels
    return processed
