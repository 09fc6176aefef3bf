"""What a GPU does in a second: shipped for those that were measured, or taken from a file of ``plan --measure``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torchtitan.experiments.lighthouse.errors import Refused

SHIPPED = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Rates:
    """Operations are multiplications and additions, counted each; a causal attention's are those below the diagonal."""

    gpu: str
    """Its name, as torch gives it."""
    date: str
    source: str
    memory_gib: float
    """That torch can have."""
    matmul: float
    """Operations a second of large products in bfloat16."""
    attention_forward: float
    attention_backward: float
    """Of dense causal attention, head dimension 128, in bfloat16."""
    window_forward: float
    window_backward: float
    """Of attention over a local window."""
    copy: float
    """Bytes a second, read and written, of a copy of a large tensor."""
    link: float
    """Bytes a second that a GPU receives from the others of its node."""
    network: float
    """Bytes a second that a GPU receives from other nodes."""
    launch: float
    """Seconds that the host takes for one Lighthouse layer, forward and backward, not compiled."""
    assumed: list[str] = field(default_factory=list)
    """Those of the above that nobody has measured on this GPU; ``network`` nobody has measured on any."""


def shipped() -> dict[str, Rates]:
    """By short name."""
    return {name: Rates(**rates) for name, rates in json.loads(SHIPPED.read_text(encoding="utf-8")).items()}


def read_rates(gpu: str | None, file: Path | None) -> Rates:
    """Those of a file, or of a GPU that is shipped; ``gpu`` is a short name, or the name that torch gives.

    Raises:
        Refused: for a file that holds no rates, or a GPU without any.
    """
    if file is not None:
        try:
            return Rates(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise Refused(f"--rates {file}: holds no rates ({error}); plan --measure writes such a file") from error
    known = shipped()
    wanted = (gpu or "").lower()
    for name, rates in known.items():
        if name == wanted or (gpu and name in wanted.split()):
            return rates
    raise Refused(
        f"--gpu {gpu}: must be one of {', '.join(known)}; on another GPU, plan --measure measures its rates in about a "
        "minute, and --rates FILE takes them"
    )


def write_rates(rates: Rates, file: Path) -> None:
    file.write_text(json.dumps(asdict(rates), indent=2) + "\n", encoding="utf-8")
