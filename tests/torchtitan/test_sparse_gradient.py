"""``training.sparse_loss_gradient``: what is left out of the gradient of the loss, and that it is little."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.experiments.lighthouse import loss as lighthouse_loss
from torchtitan.experiments.lighthouse import sparse_gradient
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.loss import OutputProjection, check_sparse_gradient
from torchtitan.experiments.lighthouse.sparse_gradient import BLOCK, SparseGradient

from helpers.settings import parse

#: 32 whole blocks and 24 columns more. Labels are below USED, in three blocks.
ROWS, DIM, VOCABULARY, USED = 700, 48, 32 * BLOCK + 24, 258
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Six chunks, the last one shorter."""
    monkeypatch.setattr(lighthouse_loss, "CHUNK_LOGITS", 128 * VOCABULARY)


def inputs(dtype, unused_logit):
    """Logits of about 0 in the columns that are used, and the same one in all others, in every row."""
    torch.manual_seed(0)
    projection = OutputProjection(DIM, VOCABULARY).to(dtype)
    hidden = torch.randn(2, ROWS // 2, DIM).to(dtype)
    hidden[..., 0] = 1
    with torch.no_grad():
        projection.weight[USED:] = 0
        projection.weight[USED:, 0] = unused_logit
    labels = torch.randint(0, USED, (2, ROWS // 2))
    labels[0, 3:60] = IGNORE_INDEX
    return projection, hidden, labels


def loss_and_gradients(projection, hidden, labels, sparse=None):
    projection.sparse = sparse
    hidden = hidden.clone().requires_grad_()
    loss = projection(hidden, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, projection.weight))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_without_probability_change_nothing(dtype):
    """To rounding, whatever the dtype, and few of them are computed. exp(-200) is nothing beside 1 in any of them."""
    projection, hidden, labels = inputs(dtype, unused_logit=-200)
    labels[0, 100], labels[1, 7] = 20 * BLOCK, VOCABULARY - 1  # in a block that is otherwise left out, and after all
    with torch.no_grad():
        hidden[0, 3:60, 0] = -1  # The unused columns are the likely ones, in rows that do not count.
    sparse = SparseGradient()
    ours = loss_and_gradients(projection, hidden, labels, sparse)
    assert 0 < sparse.share() < 0.15
    theirs = loss_and_gradients(projection, hidden, labels)
    exact = loss_and_gradients(projection.double(), hidden.double(), labels)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for got, reference, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - want).norm() / want.norm() for x in (got, reference))
        assert error <= 1.5 * allowed + 16 * eps


@pytest.mark.parametrize("unused", [0.4, 0.7, 3])
def test_what_is_left_out_is_within_the_bound(unused, monkeypatch):
    """In float64, with bfloat16's rounding u: so much of u is the probability of the unused blocks in nearly all rows.
    Of 0.4 everything is left out, of 0.7 most, and of 3 it would be too little. Some rows have more than the others,
    and leave nothing out; they do not keep the others from it."""
    u = 2.0**-8
    monkeypatch.setattr(sparse_gradient, "rounding", lambda dtype: u)
    projection, hidden, labels = inputs(torch.float64, unused_logit=-200)
    counts, columns = labels != IGNORE_INDEX, VOCABULARY // BLOCK * BLOCK - 3 * BLOCK
    usual = projection(hidden)[counts].logsumexp(-1).mean().item() + math.log(unused * u / columns)
    more = torch.tensor([1.6, 40, 2.6, 80] * 2).double() / unused
    with torch.no_grad():
        projection.weight[USED:, 0] = usual
        hidden[1, ::45, 0] += more.log() / usual
    sparse = SparseGradient()
    ours, theirs = (loss_and_gradients(projection, hidden, labels, way) for way in (sparse, None))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    of_hidden, of_weight = (got - want for got, want in zip(ours[1:], theirs[1:], strict=True))
    if unused == 3:
        assert sparse.share() == 1 and not of_hidden.any() and not of_weight.any()
        return
    assert sparse.share() < (0.25 if unused < 0.5 else 0.6)
    longest, counted, changes = projection.weight.norm(dim=1).max(), hidden[counts], of_hidden[counts].norm(dim=-1)
    assert changes.max() < u * longest and 0.3 * u * longest < changes.mean() < 0.6 * u * longest
    assert of_hidden[1, ::45].norm(dim=-1).max() < (1e-9 if unused < 0.5 else u) * longest
    assert 0 < of_weight.norm(dim=-1).sum() < len(counted) * u * counted.norm(dim=1).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_weights_have_their_whole_gradient(dtype):
    """A column that is never a label is as probable as the others, and is pushed down: to the bit as ever."""
    projection, hidden, labels = inputs(dtype, unused_logit=0)
    sparse = SparseGradient()
    ours = loss_and_gradients(projection, hidden, labels, sparse)
    assert sparse.share() == 1 and ours[2].any(dim=1).all()
    for got, want in zip(ours, loss_and_gradients(projection, hidden, labels), strict=True):
        assert torch.equal(got, want)


def test_a_vocabulary_is_pushed_down_until_it_is_left_out():
    """Gradient descent on the weight alone, in bfloat16's chunks."""
    projection, hidden, labels = inputs(torch.bfloat16, unused_logit=0)
    projection.sparse, shares = SparseGradient(), []
    for _ in range(40):
        (grad,) = torch.autograd.grad(projection(hidden, labels), projection.weight)
        with torch.no_grad():
            projection.weight -= grad.sign().nan_to_num() * 0.5
        shares.append(projection.sparse.share())
    assert shares[0] == 1 and shares[-1] < 0.2


@pytest.mark.parametrize("vocabulary", [100, BLOCK, 2 * BLOCK, 3 * BLOCK + 5])
def test_small_vocabularies_and_chunks_without_labels(vocabulary):
    torch.manual_seed(0)
    projection, hidden = OutputProjection(DIM, vocabulary), torch.randn(1, 300, DIM)
    labels = torch.randint(0, 90, (1, 300))
    labels[0, :200] = IGNORE_INDEX
    for some in (labels, torch.full_like(labels, IGNORE_INDEX)):
        ours = loss_and_gradients(projection, hidden, some, SparseGradient())
        for got, want in zip(ours, loss_and_gradients(projection, hidden, some), strict=True):
            torch.testing.assert_close(got, want)


def test_compiled_once_for_any_number_of_columns():
    """And the same numbers. The compiler's own code is not tested here: it takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    compiled = SparseGradient("aot_eager")
    for used in (1, 2, 5, 9, 12):
        projection, hidden, labels = inputs(torch.float32, unused_logit=-200)
        hidden, labels = hidden[:, :320], labels[:, :320]  # whole chunks
        labels[0, 70 : 70 + used] = torch.arange(3, 3 + used) * BLOCK
        for got, want in zip(
            loss_and_gradients(projection, hidden, labels, compiled),
            loss_and_gradients(projection, hidden, labels, SparseGradient()),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_and_deterministic_on_a_gpu(monkeypatch):
    """In bfloat16 what the plain form computes, up to rounding, and twice the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    projection, hidden, labels = (x.cuda() for x in inputs(torch.bfloat16, unused_logit=-200))
    hidden[0, 70:80, 0] = 0  # These rows are computed whole.
    sparse = SparseGradient("inductor")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (loss_and_gradients(projection, hidden, labels, sparse) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert sparse.share() < 0.25
    for got, again, want in zip(first, second, loss_and_gradients(projection, hidden, labels), strict=True):
        assert torch.equal(got, again)
        assert (got.double() - want.double()).norm() <= 2**-7 * want.double().norm()


def test_without_gradients_nothing_is_left_out_or_waited_for():
    projection, hidden, labels = inputs(torch.float32, unused_logit=-200)
    projection.sparse = None
    with torch.no_grad():
        want = projection(hidden, labels)
        projection.sparse = SparseGradient()
        assert torch.equal(projection(hidden, labels), want) and projection.sparse.share() == 1
        assert projection(hidden).shape == (*hidden.shape[:2], VOCABULARY)


def test_a_trainer_that_takes_logits_is_refused():
    projection, hidden, _ = inputs(torch.float32, unused_logit=0)
    projection.sparse = SparseGradient()
    with pytest.raises(RuntimeError, match=r"sparse_loss_gradient=true: this trainer .*, or set .*=false$"):
        projection(hidden)


@pytest.mark.parametrize("degree", ["tensor_parallel_degree", "pipeline_parallel_degree"])
def test_a_loss_outside_of_the_model_is_refused(degree):
    split, on = f"--parallelism.{degree}=2", "--training.sparse_loss_gradient"
    with pytest.raises(
        Refused, match=f"^training.sparse_loss_gradient=true: .*{degree}=2 .* nearest valid value: false"
    ):
        check_sparse_gradient(parse("debug.toml", on, split))
    check_sparse_gradient(parse("debug.toml", on))
    check_sparse_gradient(parse("debug.toml", split))
