"""Upstream's packed dataset, made to resume exactly; it has no hook between its records and its position."""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from datasets import IterableDataset
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset


class ResumableTextDataset(HuggingFaceTextDataset):
    """``HuggingFaceTextDataset`` that resumes exactly at any time and does not loop for ever over nothing.

    Upstream takes a document's tokens at once, and keeps what is left of them in a list, and in its position. Here it
    gets a long document as several samples. The position in one is that before it, and how many of its tokens upstream
    has had.
    """

    _resumed_from: dict[str, Any] | None = None
    _previous_pass_was_empty = False
    #: Of the first document, tokens that upstream has had.
    _had_before = 0
    #: The position before a document that upstream has had a part of, and how many tokens these were.
    _inside: tuple[dict[str, Any] | None, int] | None = None
    #: Bad records of this pass.
    _skipped = 0

    def __init__(
        self, *, encode: Callable[[str], Iterable[list[int]]], skip: Callable[[Any, int], int], **kwargs: Any
    ) -> None:
        """
        Args:
            encode: from a text to its tokens, in pieces.
            skip: from a sample's ``bad``, if it has one, and the number of those before it, to their number with it.
        """
        super().__init__(tokenizer=_Encoded(), **kwargs)
        self._encode, self._skip = encode, skip
        self._text_of, self._text_processor = self._text_processor, _unchanged

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
        self._own_epoch()
        return super().__iter__()

    def _get_data_iter(self) -> Iterator[list[int]]:
        """One pass over this reader's documents, as tokens.

        Raises:
            DataError: if an endless dataset yields no text in two passes running. (One empty pass is normal
                when a run resumes at the very end of an epoch.) Upstream would loop, and other ranks hang.
        """
        resumed, self._resumed_from = self._resumed_from, None
        if resumed is None:
            self._skipped = 0
        # `datasets` reports the loaded position only once it has been asked for a record.
        before = resumed["data"] if resumed is not None and "data" in resumed else self._position()
        empty = True
        for sample in super()._get_data_iter():
            if "bad" in sample:
                self._skipped = self._skip(sample["bad"], self._skipped)
            else:
                text = self._text_of(sample)
                if text and not text.isspace():
                    empty = self._previous_pass_was_empty = False
                yield from self._pieces(text, before)
            before = self._position()
        if empty and self._previous_pass_was_empty and self.infinite:
            raise DataError(
                f"dataset {self.dataset_name!r} has no document with text left for one of its readers: it needs a "
                "document for every data-parallel rank, and a file for every dataloader worker of a rank"
            )
        self._previous_pass_was_empty = empty

    def _pieces(self, text: str, before: dict[str, Any] | None) -> Iterator[list[int]]:
        had, self._had_before = self._had_before, 0
        pieces = iter(self._encode(text))
        if before is None:
            pieces = iter([[*chain.from_iterable(pieces)]])
        given, piece = 0, next(pieces)
        for following in pieces:
            given += len(piece)
            if given > had:
                self._inside = before, given
                yield piece[max(0, len(piece) - given + had) :]
            piece = following
        given, self._inside = given + len(piece), None
        if given < had:
            raise DataError(f"dataset {self.dataset_name!r}: its files have changed since the data position was saved")
        yield piece[max(0, len(piece) - given + had) :]

    def _position(self) -> dict[str, Any] | None:
        """What is saved of a position beside tokens; None where upstream counts documents instead."""
        return self._data.state_dict() if isinstance(self._data, IterableDataset) else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resumed_from = state_dict
        self._had_before, self._skipped = state_dict.get("document_tokens", 0), state_dict.get("bad_records", 0)
        if "data" in state_dict:
            self._own_epoch()
            # `datasets` ignores a state of another epoch than the dataset's own, which starts at 0.
            self._data.set_epoch(state_dict["data"]["epoch"])

    def state_dict(self) -> dict[str, Any]:
        state = self._resumed_from
        if state is None:
            state = super().state_dict()
            if self._inside is not None:
                state["data"], state["document_tokens"] = self._inside
            if self._skipped:
                state["bad_records"] = self._skipped
        # A worker's state is pickled by another thread, while this one goes on extending the buffer.
        return {**state, "token_buffer": list(state["token_buffer"])}

    def _own_epoch(self) -> None:
        # `datasets` keeps the epoch number in memory that all workers share, though each of them counts its
        # own epochs. A deep copy has a number of its own.
        if isinstance(self._data, IterableDataset):
            self._data = copy.deepcopy(self._data)


class _Encoded(BaseTokenizer):
    """A tokenizer for what is tokens already."""

    def encode(self, tokens: list[int], **_: Any) -> list[int]:
        return tokens

    def decode(self, tokens: list[int], **_: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


def _unchanged(sample: Any) -> Any:
    return sample
