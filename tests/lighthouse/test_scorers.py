import math

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import random_rows
from lighthouse import LighthouseConfig
from lighthouse.scorers import GLA_LOG_GATE, SCORERS


def softmax_attention(query, key, value):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ value


def gated_linear_attention(query, key, value):
    """The recurrence S_t = γ·S_{t−1} + k_t vᵀ_t, o_t = q_t S_t / √D with γ = exp(logsigmoid(0)/16), step by step."""
    gate = torch.exp(F.logsigmoid(torch.zeros((), dtype=query.dtype)) / 16)
    state = torch.zeros(*query.shape[:2], query.shape[-1], value.shape[-1], dtype=query.dtype)
    output = []
    for t in range(query.shape[2]):
        state = gate * state + key[:, :, t, :, None] * value[:, :, t, None, :]
        output.append((query[:, :, t, None, :] @ state)[:, :, 0] / math.sqrt(query.shape[-1]))
    return torch.stack(output, dim=2)


@pytest.mark.parametrize("dilation", [1, 2, 8])
@pytest.mark.parametrize(("scorer", "attention"), [("dilated", softmax_attention), ("gla", gated_linear_attention)])
def test_attention_scores_equal_their_definition(scorer, attention, dilation):
    """Residue by residue in float64, an uneven last block included."""
    seq_len = 8 * 50 if dilation == 8 else 8 * 47
    query, key, value = (random_rows(2, 2, seq_len, 16, seed=s, dtype=torch.float64) for s in range(3))
    config = LighthouseConfig(scorer=scorer, dilation=dilation)
    scores = SCORERS[scorer](query, key, value, config)
    for residue in range(dilation):
        q, k, v = (x[:, :, residue::dilation] for x in (query, key, value))
        for ours, expected in zip(scores, (attention(q, k, v), attention(k, q, v)), strict=True):
            torch.testing.assert_close(ours[:, :, residue::dilation], expected.norm(dim=-1), rtol=1e-10, atol=1e-12)


def test_norm_scores_are_row_norms():
    query, key = random_rows(1, 4, 64, 8), random_rows(1, 2, 64, 8, seed=1)
    query_score, key_score = SCORERS["norm"](query, key, None, LighthouseConfig())
    torch.testing.assert_close(query_score, query.norm(dim=-1).view(1, 2, 2, 64).amax(2))
    torch.testing.assert_close(key_score, key.norm(dim=-1))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_accumulate_in_float32_or_float64(scorer, dtype, expected):
    rows = [random_rows(1, 1, 256, 16, seed=s, dtype=dtype) for s in range(3)]
    assert all(score.dtype == expected for score in SCORERS[scorer](*rows, LighthouseConfig(scorer=scorer)))


def test_scorers_look_at_what_they_should():
    """The two scorers with an attention of their own rank by content that the norms do not see."""
    query, key, value = (random_rows(1, 1, 512, 16, seed=s) for s in range(3))
    louder = value.clone()
    louder[:, :, 100:104] *= 50
    for scorer in ("dilated", "gla"):
        config = LighthouseConfig(scorer=scorer)
        before, after = (SCORERS[scorer](query, key, v, config)[0][0, 0] for v in (value, louder))
        assert torch.equal(before[:100], after[:100])  # causal
        assert (after[104:112] > before[104:112]).all()


def test_the_gate_is_fixed():
    assert math.isclose(GLA_LOG_GATE, F.logsigmoid(torch.zeros((), dtype=torch.float64)).item() / 16)
