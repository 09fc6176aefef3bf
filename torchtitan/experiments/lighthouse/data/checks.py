"""Before a run starts: whether there is data to train on, and to validate on."""

from __future__ import annotations

import difflib
import math

from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.experiments.lighthouse.data.documents import chance, is_text
from torchtitan.experiments.lighthouse.data.files import HELD_OUT
from torchtitan.experiments.lighthouse.data.records import BadRecord, Skipping, is_remote
from torchtitan.experiments.lighthouse.data.section import (
    HELD_OUT_SHARE,
    held_out_share,
    scored,
    section_name,
    sources_of,
)
from torchtitan.experiments.lighthouse.data.sources import Source
from torchtitan.experiments.lighthouse.data.text_datasets import documents_of, skipping_of
from torchtitan.experiments.lighthouse.errors import DataError, Refused

#: Local files whose first record is read before a run starts.
MOST_CHECKED = 256

#: Characters that are read to find a document that is held out.
MOST_SEARCHED = 1 << 26


def check_data(job_config: JobConfig) -> None:
    """Whether there is data to train on, and to validate on: files that open, with records, and some text in them.

    Reads the first record of each local file, up to ``MOST_CHECKED`` files of a dataset. Of remote files only the first
    is opened. Where validation is on the held-out documents, it reads on until there is one.

    Raises:
        Refused: if not.
    """
    validation = scored(job_config)
    own = validation.enable and validation.dataset != HELD_OUT
    sections: list[Training | Validation] = [job_config.training, *([validation] if own else [])]
    for section in sections:
        for source in sources_of(section) or []:
            if not _has_text(source, skipping_of(section)):
                raise DataError(
                    f"{source.asked.section}.dataset={source.asked.dataset!r}: no text in any record of its "
                    f"{len(source.files):,} file(s), the first of which is {source.files[0]}"
                )
    if job_config.training.dataset.lower() == HELD_OUT:
        raise Refused(f"training.dataset={HELD_OUT!r}: must be what is trained on; nearest valid value: 'local'")
    if validation.enable and not own:
        _check_held_out(job_config)


def _has_text(source: Source, skipping: Skipping) -> bool:
    skipped, found = 0, False
    for number, file in enumerate(source.files):
        if found and (number >= MOST_CHECKED or is_remote(file)):
            break
        for text in source.read(file):
            if isinstance(text, BadRecord):
                try:
                    skipped = skipping.skip(text, skipped)
                except DataError:
                    _refuse_column(source, text)
                    raise
                continue
            found = found or is_text(text)
            if found:
                break
    return found


def _refuse_column(source: Source, bad: BadRecord) -> None:
    """Where the record has other columns, and the setting may name one of them."""
    asked = source.asked
    if bad.columns and source.takes_column:
        (nearest,) = difflib.get_close_matches(asked.column, bad.columns, n=1, cutoff=0)
        raise asked.refusal("text_column", asked.column, f"{bad.file} has no such column", repr(nearest))


def _check_held_out(config: JobConfig) -> None:
    section, share = config.training, held_out_share(config)
    if not share:
        raise Refused(
            f"validation.dataset={HELD_OUT!r}: training.held_out_share=0 holds nothing out; nearest valid value: "
            f"training.held_out_share={HELD_OUT_SHARE:g} for a run that begins, or a dataset of its own"
        )
    if (found := sources_of(section)) is None:
        raise Refused(
            f"validation.dataset={HELD_OUT!r}: dataset {section.dataset!r} of another module cannot be divided; "
            f"nearest valid value: a dataset of its own, or register_dataset (docs/data.md)"
        )
    searched, least = 0, 1.0
    for _, text in documents_of(section, found, endless=False).read_from(None):
        if (number := chance(text)) < share and is_text(text):
            return
        least, searched = min(least, number), searched + len(text)
        if searched > MOST_SEARCHED:
            return
    nearest = math.ceil(least * 1e4) / 1e4
    share_or = f"{nearest:g}, or " if nearest <= 0.5 else ""
    raise DataError(
        f"training.held_out_share={share:g}: none of the documents of {section_name(section)}.dataset="
        f"{section.dataset!r} is held out, they are too few; nearest valid value: "
        f"{share_or}a validation.dataset of its own"
    )
