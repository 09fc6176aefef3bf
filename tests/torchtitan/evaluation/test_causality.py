import copy
import math

import pytest
import torch
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.evaluation import causality
from torchtitan.experiments.lighthouse.evaluation.causality import Finding, Spot
from torchtitan.experiments.lighthouse.seams.attention import take_float32

from helpers.model import build
from lighthouse import LighthouseConfig

SEQ_LEN = 2048
#: Two tiles of 1,024 positions, and coarsest windows of 4. Half of a tile's candidates are parents, at either level.
SETTINGS = (f"--training.seq_len={SEQ_LEN}", "--lighthouse.top_k=256", "--lighthouse.layers=1-3")
DENSE = "--lighthouse.no-enable"
TILE = SEQ_LEN // 2


def checked(*overrides, model=None, tries=1, count=7):
    built, config = build(*SETTINGS, *overrides)
    model = model or built
    spots = causality.choose_spots(SEQ_LEN, count, config.lighthouse.attention_config(), seed=0)
    return causality.check(model, *texts_of(model, tries), spots)


def texts_of(model, tries=1):
    text, *others = causality.random_texts(model.output.weight.shape[0], SEQ_LEN, 1 + tries, seed=0)
    return text, others


@pytest.fixture(scope="module")
def dense():
    return build(*SETTINGS, DENSE)[0]


CAUSAL = "--lighthouse.selection=causal"


@pytest.mark.parametrize(
    "overrides",
    [
        [DENSE],
        [CAUSAL],
        [CAUSAL, "--lighthouse.local_window=128"],
        [CAUSAL, "--lighthouse.local_window=128", "--lighthouse.combine=softmax"],
        [CAUSAL, "--lighthouse.rope=after_gather"],
        [CAUSAL, "--lighthouse.no-cover_start", "--model.flavor=debug_gqa"],
    ],
    ids=[
        "dense",
        "causal",
        "causal, window",
        "causal, window, merged",
        "causal, rope after gather",
        "causal, grouped heads",
    ],
)
def test_causal_attention_moves_no_logit_at_all(overrides):
    result = checked(*overrides)
    places = {finding.where for finding in result.findings}
    assert {f"{word} the border of a tile" for word in ("before", "on", "after")} < places
    assert result.largest == 0 and not result.leaks and result.repeat == 0 < result.rounding
    assert {finding.verdict(result.rounding) for finding in result.findings} == {"exact"}
    assert causality.conclusion(result).startswith("Causal, exactly: at 7 of 7 t")


def test_the_published_selection_looks_ahead_within_its_tile():
    """Two orders of magnitude above rounding wherever something of the tile was replaced, and nowhere else."""
    result = checked()
    for finding in result.findings:
        if finding.t == TILE - 1:
            assert finding.largest == 0 == finding.moved and finding.where == "before the border of a tile"
        elif finding.t != TILE:  # of whose tile only one position stays, which may be selected either way
            assert finding.largest > 100 * result.rounding and 0 < finding.moved <= finding.t + 1
    leaks = len(result.leaks)
    assert TILE - 1 in [finding.t for finding in result.findings] and len(result.findings) == 7 and leaks in (5, 6)
    assert causality.conclusion(result).startswith(f"Not causal: at {leaks} of 7 t")


def test_delayed_scores_do_not_hide_that_later_windows_compete():
    result = checked("--lighthouse.selection=delayed")
    assert result.leaks and result.largest > 100 * result.rounding


def test_the_table_names_every_t_and_its_verdict():
    found = [
        Finding(1023, "drawn", 0.0, 0), Finding(1024, "on a border", 2e-6, 3), Finding(1500, "drawn", 0.5, 1400)
    ]  # fmt: skip
    lines = [causality.table_row(finding, 1e-5, "Lighthouse") for finding in found]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["Lighthouse", "1,023", "drawn", "0", "0", "0", "exact"],
        ["Lighthouse", "1,024", "on a border", "2e-06", "0.2", "3", "rounding"],
        ["Lighthouse", "1,500", "drawn", "0.5", "50,000", "1,400", "NOT CAUSAL"],
    ]


def add_of_later_tokens(model, size):
    """The hidden states of every position also hold so much of the sum over all positions."""

    def forward(module, inputs, output):
        return output + size * output.sum(1, keepdim=True)

    leaking = copy.deepcopy(model)
    leaking.layers["5"].register_forward_hook(forward)
    return leaking


def test_less_than_rounding_is_no_look_ahead_and_more_is(dense):
    below = checked(DENSE, model=add_of_later_tokens(dense, 1e-9))
    assert 0 < below.largest <= below.rounding and not below.leaks
    assert causality.conclusion(below).startswith("Causal up to rounding: at 7 of 7 t")
    above = checked(DENSE, model=add_of_later_tokens(dense, 1e-5))
    assert len(above.leaks) == 7 and above.largest < 1e-2


def test_rounding_is_just_above_what_float32_does(dense):
    """Against float64, whose own rounding is nothing here."""
    text, _ = texts_of(dense)
    with torch.inference_mode():
        hidden = dense.hidden_states(text)
        exact = copy.deepcopy(dense).double()(text)
        error = (dense(text) - exact).abs().max().item()
        rounding = causality.rounding_of(dense, hidden)
    assert rounding == pytest.approx(exact.abs().max().item() * math.sqrt(6 * 6 * 128) * 2**-24, rel=1e-4)
    assert rounding / 30 < error < rounding


@pytest.mark.parametrize("rows", [None, 300], ids=["all at once", "300 at a time"])
def test_a_move_is_that_of_the_logits(dense, monkeypatch, rows):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, SEQ_LEN, 128, generator=generator)
    after = before.clone()
    after[0, 7:900] += torch.randn(893, 128, generator=generator) * 10.0 ** -torch.arange(893.0)[:, None].remainder(5)
    if rows:
        monkeypatch.setattr(causality, "CHUNK_LOGITS", rows * dense.output.weight.shape[0])
    seen = []
    handle = dense.output.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    with torch.inference_mode():
        largest, moved = causality.largest_move(dense, before, after)
        handle.remove()
        assert seen == ([893] * 2 if rows is None else [300, 300, 300, 300, 293, 293])  # equal rows are not projected
        want = dense.output(dense.norm(after)) - dense.output(dense.norm(before))
    assert largest == pytest.approx(want.abs().max().item(), rel=1e-5) and moved == 893
    assert causality.largest_move(dense, before, before) == (0.0, 0)


def test_what_is_not_finite_is_no_result(dense):
    damaged = copy.deepcopy(dense)
    with torch.no_grad():
        damaged.layers["5"].feed_forward.w2.weight[7] = math.nan
    with pytest.raises(Refused, match="not finite"):
        checked(DENSE, model=damaged)
    # Also where only a replacement brings it in.
    damaged = copy.deepcopy(dense)
    with torch.no_grad():
        damaged.tok_embeddings.weight[319] = math.nan
    text, other = torch.zeros(1, 64, dtype=torch.int64), torch.full((1, 64), 319)
    with pytest.raises(Refused, match="not finite"):
        causality.check(damaged, text, [other], [Spot(5, "drawn")])


def test_a_device_that_does_not_repeat_itself_tells_nothing(dense):
    noisy = copy.deepcopy(dense)
    noisy.layers["0"].register_forward_hook(lambda module, inputs, output: output + 1e-3 * torch.randn_like(output))
    with pytest.raises(Refused, match="the same text twice moves logits by"):
        checked(DENSE, model=noisy)


def test_every_token_after_t_is_another_one():
    text, other = (torch.randint(3, (1, 50), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert (text == other).any()
    replaced = causality.replace_after(20, text, other, vocab_size=3)
    assert torch.equal(replaced[:, :21], text[:, :21]) and (replaced != text)[:, 21:].all() and replaced.max() < 3
    where = other != text
    where[:, :21] = False
    assert torch.equal(replaced[where], other[where])


def test_positions_lie_at_borders_of_every_kind():
    config = LighthouseConfig(num_levels=3, pooling_factor=4, top_k=512)
    spots = causality.choose_spots(8192, 28, config, seed=3)
    assert len({spot.t for spot in spots}) == 28 and [spot.t for spot in spots] == sorted(spot.t for spot in spots)
    assert causality.choose_spots(8192, 28, config, seed=3) == spots != causality.choose_spots(8192, 28, config, seed=4)
    for name, size in (("tile", 2048), ("coarsest window", 16)):
        for offset, word in ((-1, "before"), (0, "on"), (1, "after")):
            borders = {spot.t - offset for spot in spots if spot.where == f"{word} the border of a {name}"}
            # There are three tile borders within, and four of the seven kinds' 28 places for each.
            assert len(borders) == (3 if name == "tile" else len(borders)) >= 3
            assert all(border % size == 0 and 0 < border < 8192 for border in borders), (name, word)
    assert sum(spot.where == "drawn" for spot in spots) >= 4


def test_few_positions_and_short_sequences():
    config = LighthouseConfig()
    assert [spot.where for spot in causality.choose_spots(98304, 1, config, seed=0)] == ["drawn"]
    assert causality.choose_spots(2, 9, config, seed=0) == [Spot(0, "drawn")]
    assert [spot.t for spot in causality.choose_spots(10, 100, config, seed=0)] == list(range(9))
    # One tile, one window: no borders.
    one = LighthouseConfig(top_k=128)
    assert {spot.where for spot in causality.choose_spots(16, 9, one, seed=0)} == {"drawn"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_dense_attention_in_float32_makes_no_matrix_of_scores():
    model, _ = build("--training.seq_len=32768", DENSE)
    model.cuda()
    take_float32(model)
    text, other = (tokens.cuda() for tokens in causality.random_texts(320, 32768, 2, seed=0))
    torch.cuda.reset_peak_memory_stats()
    result = causality.check(model, text, [other], [Spot(20000, "drawn")])
    assert not result.leaks
    # The scores of one layer alone are 4 heads of 32,768² numbers: 16 GiB.
    assert torch.cuda.max_memory_allocated() < 2**31
