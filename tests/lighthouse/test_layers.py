import re

import pytest

from lighthouse.layers import default_layers, parse_layers


@pytest.mark.parametrize(
    ("layers", "n_layers", "expected"),
    [
        ("2-27", 30, range(2, 28)),
        ("2--3", 30, range(2, 28)),
        ("0--1", 6, range(6)),
        ("3", 6, [3]),
        ("-1", 6, [5]),
        ("-2--1", 6, [4, 5]),
        (" 1 , 3 - 4,3", 6, [1, 3, 4]),
    ],
)
def test_layers(layers, n_layers, expected):
    assert parse_layers(layers, n_layers) == tuple(expected)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2-27", "layer 27 is outside the model, whose 6 layers are 0 to 5 (or -6 to -1 from the end); nearest valid layer: 5"),  # noqa: E501
        ("-7", "layer -7 is outside the model, whose 6 layers are 0 to 5 (or -6 to -1 from the end); nearest valid layer: -6"),  # noqa: E501
        ("4-2", "the range '4-2' is empty in a 6-layer model (4 to 2); nearest valid range: '2-4'"),
        ("", "'' is no layer"),
        ("2-3,", "'' is no layer"),
        ("all", "'all' is no layer"),
        ("1-2-3", "'1-2-3' is no layer"),
    ],
)  # fmt: skip
def test_layers_outside_the_model_or_no_layers_at_all(layers, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_layers(layers, 6, setting="lighthouse.layers")
    assert f"lighthouse.layers={layers!r}" in str(error.value)


@pytest.mark.parametrize(("n_layers", "expected"), [(30, range(2, 28)), (5, [2]), (4, range(4)), (1, [0])])
def test_by_default_both_ends_stay_dense_where_layers_are_left(n_layers, expected):
    assert parse_layers(default_layers(n_layers), n_layers) == tuple(expected)
