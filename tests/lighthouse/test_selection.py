import pytest
import torch

from helpers.cases import GEOMETRIES, entries, make, random_rows
from helpers.reference import select_naively
from lighthouse import LighthouseConfig, select
from lighthouse.pyramid import level_offsets


@pytest.mark.parametrize(
    ("geometry", "cover_start"),
    [(geometry, True) for geometry in GEOMETRIES] + [(GEOMETRIES[i], False) for i in (1, 3, 5)],
)
def test_equals_the_definition(geometry, cover_start, on):
    device = on["device"]
    config, seq_len = make(*geometry, cover_start=cover_start, backend=on["backend"])
    batch, heads = (1, 1) if on == {"device": "cpu", "backend": "triton"} else (2, 2)  # the interpreter is slow
    query, key = (random_rows(batch, heads, seq_len, 8, seed=s, device=device) for s in (0, 1))
    selection = select(query, key, config)
    for b in range(batch):
        for g in range(heads):
            expected = select_naively(query[b, g].norm(dim=-1).cpu(), key[b, g].norm(dim=-1).cpu(), config)
            assert entries(selection, b, g) == expected


@pytest.mark.parametrize(
    ("geometry", "selection"),
    [(GEOMETRIES[i], "delayed") for i in (2, 5)] + [(GEOMETRIES[i], "causal") for i in (1, 2, 5, 6, 7)],
)
def test_other_selections_equal_the_definition(geometry, selection, on):
    config, seq_len = make(*geometry, selection=selection, backend=on["backend"])
    query, key = (random_rows(1, 1, seq_len, 8, seed=s, device=on["device"]) for s in (0, 1))
    expected = select_naively(query[0, 0].norm(dim=-1).cpu(), key[0, 0].norm(dim=-1).cpu(), config)
    assert entries(select(query, key, config), 0, 0) == expected


@pytest.mark.parametrize("selection", ["published", "delayed", "causal"])
def test_delayed_scores_do_not_see_the_window_that_they_select(selection):
    """A window that beats every other, or none, is selected by what is before it; as published, by what it holds."""
    config, _ = make(4096, 3, 4, 128, selection=selection)
    window, rows = 16, random_rows(1, 1, 4096, 8)
    expanded = []
    for size in (0.0, 100.0):
        changed = rows.clone()
        changed[:, :, 200 * window : 201 * window] *= size
        chosen = set(entries(select(changed, changed, config), 0, 0))
        expanded.append([(1, 200 * 4) in chosen, (1, 201 * 4) in chosen])
    own, following = zip(*expanded, strict=True)
    delayed = selection != "published"
    assert following == ((False, True) if delayed else (following[0],) * 2)
    assert own == ((own[0],) * 2 if delayed else (False, True))


def the_past_decides(positions, config, seq_len, device="cpu") -> list[bool]:
    """For each position t: rows after it are replaced by others of any size. Which of the entries that end by t are
    selected, and with them every slot, stays as it was?"""
    p = config.pooling_factor
    rows = random_rows(2, 1, 1, seq_len, 8, device=device)
    before = entries(select(*rows, config), 0, 0)
    kept = []
    for t in positions:
        changed = rows.clone()
        changed[..., t + 1 :, :] *= random_rows(seq_len - t - 1, 1, seed=t, device=device).exp()
        after = entries(select(*changed, config), 0, 0)
        past = [[entry for entry in chosen if (entry[1] + 1) * p ** entry[0] - 1 <= t] for chosen in (before, after)]
        kept.append(past[0] == past[1])
    return kept


def test_a_causal_selection_depends_on_the_past_alone(on):
    """At the borders of tiles (1,024 positions), of coarsest windows (4), and between; each level selects half."""
    config, seq_len = make(2048, 3, 2, 256, selection="causal", backend=on["backend"])
    interpreted = on == {"device": "cpu", "backend": "triton"}  # slow
    positions = (1023, 1409) if interpreted else (0, 3, 4, 515, 1023, 1024, 1027, 1409, 1600, 2046)
    assert all(the_past_decides(positions, config, seq_len, on["device"]))


@pytest.mark.parametrize("selection", ["published", "delayed"])
def test_other_selections_depend_on_what_follows(selection):
    config, seq_len = make(2048, 3, 2, 256, selection=selection)
    assert not any(the_past_decides((515, 1409), config, seq_len))


def test_a_causal_selection_spreads_over_its_tile():
    """Scores without a trend: about as many parents in every quarter of a tile, about half of those published."""
    config, seq_len = make(32768, 3, 4, 512, selection="causal")
    query, key = (random_rows(1, 8, seq_len, 8, seed=s) for s in (0, 1))
    chosen = select(query, key, config)
    level_0 = chosen.index[chosen.level == 0].view(8, 4, -1)  # heads, tiles
    quarter = (level_0 % 8192) // 2048
    share = torch.stack([(quarter == i).sum() for i in range(4)]) / quarter.numel()
    # 8 heads, 4 tiles: 32 · 128 parents. An even spread, give or take what the quotas and the start of a tile do.
    assert ((share - 0.25).abs() < 0.05).all(), share


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_length_order_and_inverse(geometry):
    config, seq_len = make(*geometry)
    p, num_levels = config.pooling_factor, config.num_levels
    selection = select(random_rows(1, 3, seq_len, 4), random_rows(1, 3, seq_len, 4, seed=1), config)
    assert selection.level.dtype == torch.int8 and selection.index.dtype == torch.int32
    assert selection.level.shape == selection.index.shape == (1, 3, config.selected_length(seq_len))
    offsets = level_offsets(seq_len, num_levels, p)
    for g in range(3):
        chosen = entries(selection, 0, g)
        assert len(set(chosen)) == len(chosen)
        keys = [((i + 1) * p**level - 1, level) for level, i in chosen]
        assert keys == sorted(keys)
        inverse_map = selection.inverse_map[0, g].tolist()
        assert [inverse_map[offsets[level] + i] for level, i in chosen] == list(range(len(chosen)))
        assert sum(slot >= 0 for slot in inverse_map) == len(chosen)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cover_start_leaves_no_position_without_an_entry(geometry):
    seq_len, _, p, _ = geometry

    def fan_in(cover_start):
        config, _ = make(*geometry, cover_start=cover_start)
        # Small norms first: without cover_start the first windows lose.
        ramp = torch.linspace(0.1, 1, seq_len)[None, None, :, None].expand(1, 1, -1, 4)
        count = torch.zeros(seq_len, dtype=torch.int)
        for level, i in entries(select(ramp, ramp, config), 0, 0):
            first = (i + 1) * p**level - 1
            count[first : first + p**level] += 1
        return count

    assert fan_in(True).min() >= 1
    assert fan_in(True).max() <= geometry[1]
    if seq_len // p ** (geometry[1] - 1) > 128:  # otherwise every coarsest window is a parent anyway
        assert fan_in(False).min() == 0


def test_the_lower_index_wins_among_equals(on):
    config, seq_len = make(2048, 3, 2, 256, backend=on["backend"])
    generator = torch.Generator().manual_seed(0)
    # Few distinct norms, so that ties decide nearly everything, at every level.
    levels = torch.randint(1, 4, (2, seq_len, 1), generator=generator).float().to(on["device"])
    query, key = levels[0].expand(1, 1, -1, 4), levels[1].expand(1, 1, -1, 4)
    expected = select_naively(query[0, 0].norm(dim=-1).cpu(), key[0, 0].norm(dim=-1).cpu(), config)
    assert entries(select(query, key, config), 0, 0) == expected
    constant = torch.ones(1, 1, seq_len, 4, device=on["device"])
    expected = select_naively(torch.ones(seq_len), torch.ones(seq_len), config)
    assert entries(select(constant, constant, config), 0, 0) == expected


def test_bfloat16_scores_do_not_tie_more_than_their_rows():
    """Norms are taken in float32: rows that differ in bfloat16 rank as their exact norms do."""
    config, seq_len = make(4096, 3, 4, 128)
    query, key = (random_rows(1, 2, seq_len, 64, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    low, exact = select(query, key, config), select(query.double(), key.double(), config)
    assert torch.equal(low.entry, exact.entry)
    assert query.float().norm(dim=-1).unique().numel() > 10 * query.norm(dim=-1).unique().numel()


def test_strides_and_repetition_do_not_matter(on):
    device = on["device"]
    config, seq_len = make(512, 3, 2, 128, backend=on["backend"])
    query, key = (random_rows(2, seq_len, 2, 8, seed=s, device=device).transpose(1, 2) for s in (0, 1))
    first = select(query, key, config)
    for again in (select(query.contiguous(), key.contiguous(), config), select(query, key, config)):
        assert torch.equal(first.entry, again.entry) and torch.equal(first.inverse_map, again.inverse_map)


@pytest.mark.parametrize("scorer", ["norm", "dilated", "gla"])
def test_a_group_scores_by_its_highest_query_head(scorer):
    """One key/value head with H query heads selects as one head whose scores are the heads' maxima."""
    from lighthouse.scorers import SCORERS

    config, seq_len = make(1024, 3, 2, 128, scorer=scorer)
    query = random_rows(2, 6, seq_len, 8)
    key, value = random_rows(2, 2, seq_len, 8, seed=1), random_rows(2, 2, seq_len, 8, seed=2)
    grouped = SCORERS[scorer](query, key, value, config)
    repeated = SCORERS[scorer](query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), config)
    for ours, theirs in zip(grouped, repeated, strict=True):
        torch.testing.assert_close(ours, theirs.unflatten(1, (2, 3)).amax(2))


def test_selection_carries_no_gradient():
    config, seq_len = make(1024, 3, 2, 128)
    query = random_rows(1, 1, seq_len, 8).requires_grad_()
    assert not select(query, query, config).entry.requires_grad


@pytest.mark.parametrize(
    ("query", "key", "expected"),
    [
        ((1, 2, 1024), (1, 2, 1024), "batch, heads, seq_len, head_dim"),
        ((1, 3, 1024, 8), (1, 2, 1024, 8), "must divide"),
        ((1, 2, 1024, 8), (1, 2, 512, 8), "must agree"),
        ((1, 2, 1024, 8), (2, 2, 1024, 8), "must agree"),
    ],
)
def test_shapes_that_do_not_fit(query, key, expected):
    with pytest.raises(ValueError, match=expected):
        select(torch.ones(query), torch.ones(key), LighthouseConfig(top_k=128, pooling_factor=2))


def test_scorers_that_need_the_value_say_so():
    config, seq_len = make(1024, 3, 2, 128, scorer="dilated")
    rows = random_rows(1, 1, seq_len, 8)
    with pytest.raises(ValueError, match="needs the value"):
        select(rows, rows, config)
    with pytest.raises(ValueError, match="shape of key"):
        select(rows, rows, config, value=rows[..., :4])
