"""The results as a table by kind, what was not as it should be, and a list."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = [
    *("id", "run", "what", "last_logged", "resumed_from", "compared_at"),
    *("survived", "manual_steps", "command", "bit_equal", "seconds", "commit"),
]


def render(results: Sequence[dict[str, Any]], about: str) -> str:
    faults = [result for result in results if result["kind"] not in ("end", "break")]
    ends = [result for result in results if result["kind"] == "end"]
    lines = [
        f"{len(faults)} faults ({about}).",
        "",
        "| kind | injected | survived | manual steps | bit-equal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in [*dict.fromkeys(sorted(result["kind"] for result in faults)), None]:
        of_kind = [result for result in faults if kind in (None, result["kind"])]
        steps = sum(result["manual_steps"] for result in of_kind)
        counts = [len(of_kind), count(of_kind, "survived"), steps, count(of_kind, "bit_equal")]
        lines.append(f"| {kind or '**all**'} | {' | '.join(map(str, counts))} |")
    lines += ["", f"{count(ends, 'bit_equal')} of {len(ends)} runs that came to their last step were bit-equal there."]
    failed = [result for result in [*faults, *ends] if not (result["survived"] and result["bit_equal"])]
    lines += [""] * bool(failed)
    for result in failed:
        why = [problem.strip().splitlines()[-1] for problem in result["problems"]] + result["unequal"]
        lines.append(f"- {result['id']}, {result['run']}, {result['what']}: {'; '.join(why)}")
    return "\n".join(lines) + "\n"


def count(results: Sequence[dict[str, Any]], what: str) -> int:
    return sum(bool(result[what]) for result in results)


def write_list(file: Path, results: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
