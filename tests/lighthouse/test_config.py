import dataclasses
import re

import pytest

from lighthouse import LighthouseConfig


def numbers_after(text: str, phrase: str) -> list[int]:
    """The numbers that a message offers after ``phrase``."""
    offered = re.search(re.escape(phrase) + r"[^:]*: ([\d or]+)", text)
    assert offered, text
    return [int(number) for number in re.findall(r"\d+", offered.group(1))]


def refuse(seq_len: int = 98304, **changes) -> str:
    with pytest.raises(ValueError) as error:
        LighthouseConfig(**changes).validate(seq_len)
    return str(error.value)


def test_the_papers_geometries_are_valid():
    # S of the ablation grid.
    grid = {(3, 4, 1536): 18432, (3, 4, 2048): 22528, (3, 2, 1536): 30720, (3, 8, 1536): 26112, (3, 2, 6144): 49152}
    grid |= {(4, 2, 1536): 21504, (4, 2, 2048): 24576, (5, 2, 1536): 18432, (5, 2, 2048): 22528}
    for (num_levels, pooling_factor, top_k), selected in grid.items():
        config = LighthouseConfig(num_levels=num_levels, pooling_factor=pooling_factor, top_k=top_k)
        assert config.selected_length(98304) == selected


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LighthouseConfig().top_k = 256
    with pytest.raises(TypeError):
        LighthouseConfig(3)


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_too_few_levels(num_levels):
    message = refuse(num_levels=num_levels)
    assert f"num_levels={num_levels}" in message and message.endswith("nearest valid value: 2")


@pytest.mark.parametrize(("value", "nearest"), [(1, [2]), (0, [2]), (-4, [2]), (3, [2, 4]), (6, [4, 8]), (12, [8, 16])])
def test_pooling_factor_is_a_power_of_two(value, nearest):
    message = refuse(pooling_factor=value)
    assert f"pooling_factor={value}" in message and "power of two" in message
    assert numbers_after(message, "nearest valid values") == nearest


@pytest.mark.parametrize(("value", "nearest"), [(0, [128]), (-5, [128]), (100, [128]), (1500, [1408, 1536])])
def test_top_k_is_a_multiple_of_128(value, nearest):
    message = refuse(top_k=value)
    assert f"top_k={value}" in message and "multiple of 128" in message
    assert numbers_after(message, "nearest valid values") == nearest


@pytest.mark.parametrize(
    ("seq_len", "changes", "rule"),
    [
        (98305, {}, "divisible by"),
        (100000, {"num_levels": 5, "pooling_factor": 8}, "divisible by"),
        (7, {}, "divisible by"),
        (98304, {"top_k": 128 * 5}, "evenly"),
        (98304 + 16, {}, "evenly"),
        (16384, {}, "evenly"),
        (12288, {}, "at least 128 entries"),
        (2048, {"top_k": 128, "num_levels": 4}, "at least 128 entries"),
    ],
)
def test_broken_geometry_names_lengths_and_budgets_that_work(seq_len, changes, rule):
    message = refuse(seq_len, **changes)
    config = LighthouseConfig(**changes)
    assert f"seq_len={seq_len}" in message and rule in message
    lengths = numbers_after(message, "valid values" if rule == "divisible by" else "valid seq_len")
    assert lengths
    for length in lengths:
        config.validate(length)
    if rule != "divisible by" and "top_k: none" not in message:
        for top_k in numbers_after(message, "valid top_k"):
            dataclasses.replace(config, top_k=top_k).validate(seq_len)


def test_the_offered_lengths_are_the_nearest():
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=256)  # whole tiles: multiples of 8, at least 1024

    def valid(length):
        try:
            config.validate(length)
        except ValueError:
            return False
        return True

    for seq_len in (5, 1020, 1030, 1501, 2047):
        message = refuse(seq_len, num_levels=3, pooling_factor=2, top_k=256)
        offered = numbers_after(message, "valid seq_len" if "valid seq_len" in message else "valid values")
        below = [n for n in range(1, seq_len) if valid(n)][-1:]
        above = [n for n in range(seq_len, 4096) if valid(n)][:1]
        assert offered == below + above


@pytest.mark.parametrize("seq_len", [0, -4096, 4096.0, True, "4096"])
def test_sequence_length_is_a_positive_integer(seq_len):
    assert f"seq_len={seq_len!r}" in refuse(seq_len)


def test_dilation_divides_the_sequence():
    message = refuse(98304, scorer="dilated", dilation=5)
    assert "dilation=5" in message and "98304" in message
    assert numbers_after(message, "nearest valid values") == [4, 6]
    LighthouseConfig(scorer="norm", dilation=5).validate(98304)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scorer": "l2"}, "'norm', 'dilated', 'gla'"),
        ({"backend": "cuda"}, "'auto', 'torch', 'triton'"),
        ({"dilation": 0}, "nearest valid value: 1"),
        ({"top_k": 1536.0}, "integer"),
        ({"num_levels": True}, "integer"),
        ({"selection": "casual"}, "'published', 'delayed', 'causal'"),
        ({"combine": "mean"}, "'sum', 'softmax'"),
        ({"local_window": -128}, "nearest valid values: 0"),
        ({"local_window": 100}, "nearest valid values: 0 or 128"),
        ({"local_window": 500}, "nearest valid values: 384 or 512"),
        ({"local_window": 512.0}, "integer"),
    ],
)
def test_wrong_names_and_types_are_refused_at_construction(changes, expected):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")) as error:
        LighthouseConfig(**changes)
    assert expected in str(error.value)


def test_a_window_alone_needs_no_geometry_but_a_window():
    config = LighthouseConfig(selection="none", local_window=512)
    config.validate(98305)
    assert config.selected_length(98305) == 0
    with pytest.raises(ValueError, match=r"local_window=0: selection='none' needs a window; .*: 128"):
        LighthouseConfig(selection="none")


def test_a_merge_needs_parts():
    LighthouseConfig(combine="softmax").validate(98304, 4)
    with pytest.raises(ValueError, match=r"combine='softmax': selection='none' .*; nearest valid value: 'sum'"):
        LighthouseConfig(combine="softmax", selection="none", local_window=512)


def test_a_window_fits_into_a_chunk():
    config = LighthouseConfig(local_window=12288)
    config.validate(98304, 4)
    config.validate(98304)
    with pytest.raises(
        ValueError, match=r"local_window=12288: .* 8192 tokens .* 12 chunks .* nearest valid value: 8192"
    ):
        config.validate(98304, 12)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr("lighthouse.config.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend='triton' is not available on 'cpu'"):
        LighthouseConfig(backend="triton").resolve_backend("cpu")
    assert LighthouseConfig(backend="triton").resolve_backend("cuda") == "triton"
    assert LighthouseConfig(backend="torch").resolve_backend("cuda") == "torch"
    assert LighthouseConfig().resolve_backend("cuda") == "triton"
    assert LighthouseConfig().resolve_backend("cpu") == LighthouseConfig().resolve_backend("meta") == "torch"
