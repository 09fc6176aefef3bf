"""The loss without logits against upstream's loss of logits."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss
from torchtitan.experiments.lighthouse import loss as lighthouse_loss
from torchtitan.experiments.lighthouse.loss import OutputProjection

from helpers.model import build, tokens

ROWS, DIM, VOCABULARY = 700, 48, 1000


@pytest.fixture
def small_chunks(monkeypatch):
    """Six chunks, the last one shorter."""
    monkeypatch.setattr(lighthouse_loss, "CHUNK_LOGITS", 128 * VOCABULARY)


def inputs(dtype):
    torch.manual_seed(0)
    projection = OutputProjection(DIM, VOCABULARY).to(dtype)
    hidden = torch.randn(2, ROWS // 2, DIM).to(dtype)
    labels = torch.randint(0, VOCABULARY, (2, ROWS // 2))
    labels[0, 3:60] = IGNORE_INDEX
    return projection, hidden, labels


def loss_and_gradients(projection, hidden, labels, of_labels, scale=1 / 640):
    """The loss, scaled as the trainer scales it, and the gradients in hidden and weight."""
    hidden = hidden.clone().requires_grad_()
    loss = (projection(hidden, labels) if of_labels else cross_entropy_loss(projection(hidden), labels)) * scale
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, projection.weight))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_loss_of_logits(dtype, small_chunks):
    # Upstream computes the loss itself in float32 whatever the logits are.
    projection, hidden, labels = inputs(dtype)
    ours = loss_and_gradients(projection, hidden, labels, of_labels=True)
    theirs = loss_and_gradients(projection, hidden, labels, of_labels=False)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-6 * want.abs().max().item())


def test_bfloat16_is_no_further_from_the_truth_than_upstream(small_chunks):
    projection, hidden, labels = inputs(torch.bfloat16)
    ours = loss_and_gradients(projection, hidden, labels, of_labels=True)
    theirs = loss_and_gradients(projection, hidden, labels, of_labels=False)
    exact = loss_and_gradients(projection.double(), hidden.double(), labels, of_labels=True)
    eps = torch.finfo(torch.bfloat16).eps
    for got, reference, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - want).norm() / want.norm() for x in (got, reference))
        # A rounding of its own where upstream has none: the sum over chunks, the trainer's scale.
        assert error <= allowed + eps / 2


def test_without_gradients_none_are_computed(small_chunks):
    projection, hidden, labels = inputs(torch.float32)
    with torch.no_grad():
        with FlopCounterMode(display=False) as products:
            loss = projection(hidden, labels)
        assert products.get_total_flops() == 2 * ROWS * DIM * VOCABULARY
        torch.testing.assert_close(loss, cross_entropy_loss(projection(hidden), labels))
    assert not loss.requires_grad


def test_the_model_with_labels_computes_upstreams_loss():
    """Every parameter's gradient."""
    labels = tokens().roll(-1, dims=1)
    results = []
    for of_labels in (True, False):
        model, _ = build()
        loss = model(tokens(), labels=labels) if of_labels else cross_entropy_loss(model(tokens()), labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
