"""Which layers of a model run Lighthouse Attention; the others stay dense."""

from __future__ import annotations

import re

#: How many of the first and of the last layers stay dense where nothing says which do.
DENSE_AT_EACH_END = 2


def parse_layers(layers: str, n_layers: int, setting: str = "layers") -> tuple[int, ...]:
    """The layer numbers that ``layers`` names in a model of ``n_layers``, ascending.

    Args:
        layers: comma-separated layers and inclusive ranges; negative numbers count from the end: ``"2-27"``,
            ``"0,2--3"``.
        setting: what a message calls it.

    Raises:
        ValueError: for text that is no list of layers, an empty range, or a layer outside the model.
    """
    chosen: set[int] = set()
    last = n_layers - 1
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"{setting}={layers!r}: {part.strip()!r} is no layer and no range such as '2-27' or '2--3'"
            )
        ends = [int(end) for end in match.groups() if end is not None]
        for end in ends:
            if not -n_layers <= end <= last:
                nearest = last if end > last else -n_layers
                raise ValueError(
                    f"{setting}={layers!r}: layer {end} is outside the model, whose {n_layers} layers are "
                    f"0 to {last} (or -{n_layers} to -1 from the end); nearest valid layer: {nearest}"
                )
        first, final = (ends[0] % n_layers, ends[-1] % n_layers)
        if first > final:
            raise ValueError(
                f"{setting}={layers!r}: the range {part.strip()!r} is empty in a {n_layers}-layer model "
                f"({first} to {final}); nearest valid range: '{final}-{first}'"
            )
        chosen.update(range(first, final + 1))
    return tuple(sorted(chosen))


def default_layers(n_layers: int) -> str:
    """All but the first two and the last two, or all layers of a model that has no others."""
    ends = DENSE_AT_EACH_END
    return f"{ends}-{n_layers - 1 - ends}" if n_layers > 2 * ends else f"0-{n_layers - 1}"
