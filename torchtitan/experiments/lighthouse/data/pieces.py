"""Long documents are cut into tokens piece by piece: the same tokens, without all of them at once.

`tokenizers` needs more than a hundred bytes of memory for each token, and the more time for each character the longer a
text is. A cut is made only where the tokens on both sides do not depend on it:

- anywhere, where every byte is a token (the byte tokenizer);
- otherwise before a single space between letters, or after the end of a line, where the tokenizer's own splitter
  divides the text around, and the two sides have the tokens that they have together.

A tokenizer that splits nothing, or that does something else at the beginning of a text, gets every document whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

#: Characters of a piece. `tokenizers` is fastest at about this length.
PIECE = 1 << 14

#: Characters before a piece's end among which a place for the cut is looked for, and how many places are tried.
NEAR_END, MOST_TRIES = 1024, 8

#: Characters on each side of a cut that are looked at.
AROUND = 64

_PLACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\n)(?=\w)")


class PieceEncoder:
    """From a text to its tokens, begin and end of text with them, in pieces."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> Iterator[list[int]]:
        """Yield, one after the other, lists with the tokens of ``encode(text, add_bos=True, add_eos=True)``."""
        cuts = self._cuts(text)
        if len(text) <= PIECE or self._frame is None or (first := next(cuts, None)) is None:
            yield self._tokenizer.encode(text, add_bos=True, add_eos=True)
            return
        before, after = self._frame
        yield before + self._plain(text[:first])
        start = first
        for cut in cuts:
            yield self._plain(text[start:cut])
            start = cut
        yield self._plain(text[start:]) + after

    def _cuts(self, text: str) -> Iterator[int]:
        if self._bytes_alone:
            yield from range(PIECE, len(text), PIECE)
        elif self._splits:
            end = PIECE
            while end < len(text):
                # Looks for places from the end on, and takes none that was taken.
                places = [match.start() for match in _PLACE.finditer(text, end - NEAR_END, end)]
                cut = next((at for at in islice(reversed(places), MOST_TRIES) if self._is_safe(text, at)), None)
                if cut is not None:
                    yield cut
                end = PIECE + (end if cut is None else cut)

    def _is_safe(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - AROUND) : cut], text[cut : cut + AROUND]
        return all(half(left) + half(right) == half(left + right) for half in (self._words, self._plain))

    def _words(self, text: str) -> list[str]:
        normalizer, splitter = self._inner.normalizer, self._inner.pre_tokenizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return [word for word, _ in splitter.pre_tokenize_str(normal)]

    def _plain(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    @property
    def _inner(self) -> Tokenizer:
        assert isinstance(self._tokenizer, HuggingFaceTokenizer)
        return self._tokenizer.tokenizer

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]] | None:
        """The tokens before and after a text's own, or None where they cannot be told."""
        if not isinstance(self._tokenizer, HuggingFaceTokenizer):
            return None
        if self._inner.truncation is not None or self._inner.padding is not None:
            return None
        whole, own = self._tokenizer.encode("a", add_bos=True, add_eos=True), self._plain("a")
        places = [at for at in range(len(whole)) if own and whole[at : at + len(own)] == own]
        return (whole[: places[0]], whole[places[0] + len(own) :]) if len(places) == 1 else None

    @cached_property
    def _splits(self) -> bool:
        return self._inner.pre_tokenizer is not None

    @cached_property
    def _bytes_alone(self) -> bool:
        """Whether each byte is a token, whatever is beside it."""
        parts = json.loads(self._inner.to_str())
        model, splitter = parts["model"], parts["pre_tokenizer"] or {}
        plain_text = self._inner.encode_special_tokens and all(token["special"] for token in parts["added_tokens"])
        return (
            plain_text
            and parts["normalizer"] is None
            and splitter.get("type") == "ByteLevel"
            and not splitter["add_prefix_space"]
            and model["type"] == "BPE"
            and not model["merges"]
            and not model["continuing_subword_prefix"]
            and not model["end_of_word_suffix"]
        )
