"""What a section of settings asks for: one dataset or a mixture, and how much of it is held out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.experiments.lighthouse.data.files import HELD_OUT, MIXTURE, Asked
from torchtitan.experiments.lighthouse.data.sources import Source, find
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.hf_datasets.text_datasets import DATASETS

#: Of the documents, where nothing else is said.
HELD_OUT_SHARE = 0.01

#: These come with a split for validation.
WITH_SPLIT = ("c4", "stdlib")

#: What a table of ``training.mixture`` may say, and its default.
_TABLE: dict[str, Any] = {
    "weight": 1.0,
    "dataset": "local",
    "dataset_path": "",
    "dataset_split": "",
    "dataset_config": "",
    "text_column": "text",
}


def section_name(section: Training | Validation) -> str:
    return "validation" if isinstance(section, Validation) else "training"


def asked_by(section: Training | Validation) -> list[Asked]:
    """One dataset, or those of a mixture, in their order.

    Raises:
        Refused: for a mixture that is none.
    """
    # Upstream's own sections do not have all settings.
    get, name = partial(getattr, section), section_name(section)
    tables = get("mixture", [])
    if section.dataset == MIXTURE:
        return [_asked_by_table(number, table) for number, table in enumerate(_checked(name, tables))]
    if tables:
        raise Refused(
            f"{name}.dataset={section.dataset!r}: must be {MIXTURE!r} where {name}.mixture has tables; nearest valid "
            f"value: {MIXTURE!r}"
        )
    return [
        Asked(
            section.dataset.lower(),
            section.dataset_path or "",
            get("dataset_split", ""),
            get("dataset_config", ""),
            get("text_column", "text"),
            name,
        )
    ]


def weights_of(section: Training | Validation) -> list[float]:
    """Those of a mixture, adding up to 1; none where it is one dataset."""
    if section.dataset != MIXTURE:
        return []
    weights = [float(table.get("weight", _TABLE["weight"])) for table in getattr(section, "mixture", [])]
    return [weight / sum(weights) for weight in weights]


def _checked(name: str, tables: Any) -> list[Mapping[str, Any]]:
    example = '[[training.mixture]] with dataset_path = "FOLDER" and weight = 0.5'
    if name != "training":
        raise Refused(f"{name}.dataset={MIXTURE!r}: only training mixes; nearest valid value: {HELD_OUT!r}")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
        raise Refused(f"training.mixture={tables!r}: must be a list of tables; nearest valid value: {example}")
    for number, table in enumerate(tables):
        for key, value in table.items():
            at = f"training.mixture[{number}].{key}"
            if key not in _TABLE:
                (nearest,) = difflib.get_close_matches(key, _TABLE, n=1, cutoff=0)
                raise Refused(f"{at}: no such setting; nearest valid value: {nearest!r}")
            if key == "weight":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                    raise Refused(f"{at}={value!r}: must be a number above 0; nearest valid value: 1")
            elif not isinstance(value, str):
                raise Refused(f"{at}={value!r}: must be a text; nearest valid value: {str(value)!r}")
        if table.get("dataset") in (MIXTURE, HELD_OUT):
            raise Refused(
                f"training.mixture[{number}].dataset={table['dataset']!r}: must be one dataset; nearest valid value: "
                "'local'"
            )
    return tables


def _asked_by_table(number: int, table: Mapping[str, Any]) -> Asked:
    full = _TABLE | dict(table)
    return Asked(
        full["dataset"].lower(),
        full["dataset_path"],
        full["dataset_split"],
        full["dataset_config"],
        full["text_column"],
        f"training.mixture[{number}]",
    )


def sources_of(section: Training | Validation) -> list[Source] | None:
    """The datasets of a section, found. None for one that another module has registered in upstream's way.

    Raises:
        Refused: as ``find``, and where a mixture has such a dataset, or it is to be shuffled or chosen from.
    """
    asked = asked_by(section)
    found = [find(one) for one in asked]
    sources = [source for source in found if source is not None]
    if len(sources) == len(asked):
        return sources
    name = asked[found.index(None)].dataset
    own = [
        setting
        for setting in ("shuffle_buffer", "held_out_share", "min_document_chars")
        if getattr(section, setting, None)
    ]
    if section.dataset == MIXTURE or own:
        what = f"{section_name(section)}.{(own or ['mixture'])[0]}"
        known = [name for name, config in DATASETS.items() if hasattr(config.loader, "list_files")]
        raise Refused(
            f"{what}: dataset {name!r} is registered in upstream's way, and cannot be used with it; nearest valid "
            f"value: one of {', '.join(known)}, or register_dataset (docs/data.md)"
        )
    return None


def scored(config: JobConfig) -> Validation:
    """[validation], as it is where it says what to score, or where that is the held-out share.

    Otherwise the split for validation is scored that C4 and the standard library come with, and training reads on as
    if there were no validation.
    """
    section, training = config.validation, config.training
    name = training.dataset.lower()
    if section.dataset != HELD_OUT or name not in WITH_SPLIT or getattr(training, "held_out_share", None):
        return section
    return replace(section, dataset=f"{name}_validation", dataset_path=section.dataset_path or training.dataset_path)


def held_out_share(config: JobConfig) -> float:
    """Of the documents of [training]: what is set, or by default ``HELD_OUT_SHARE`` where validation needs them."""
    share = getattr(config.training, "held_out_share", None)
    if share is not None:
        return float(share)
    return HELD_OUT_SHARE if config.validation.enable and scored(config).dataset == HELD_OUT else 0.0
