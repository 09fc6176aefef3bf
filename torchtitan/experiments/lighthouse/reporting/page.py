"""Tables as Markdown, and all of it as one page."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from torchtitan.experiments.lighthouse.reporting.tables import Table


def as_markdown(table: Table) -> str:
    _, header, rows = table
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def as_page(sentences: list[str], found: list[Table], picture: Path) -> str:
    """One HTML file that needs no other."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    said = "".join(f"<h1>{html.escape(sentence)}</h1>" for sentence in sentences)
    parts = [
        f"<h2>{html.escape(heading)}</h2><table>{row(header, 'th') if any(header) else ''}"
        + "".join(row(cells, "td") for cells in rows)
        + "</table>"
        for heading, header, rows in found
    ]
    image = base64.b64encode(picture.read_bytes()).decode()
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%}"
        "h1{font-size:1.4em}table{border-collapse:collapse}"
        "td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Loss curves</title><style>{style}</style>'
        f'{said}<img alt="loss against steps and time" src="data:image/png;base64,{image}">{"".join(parts)}</html>\n'
    )
