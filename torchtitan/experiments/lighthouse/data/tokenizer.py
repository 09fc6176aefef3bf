"""The tokenizer of a run: upstream's Hugging Face tokenizer, and where the shipped byte tokenizer lies."""

import json
from pathlib import Path

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.errors import Refused

#: Folder of the shipped tokenizer: ids 0-255 are bytes, 256 begins a text and 257 ends it.
#: Written by scripts/build_byte_tokenizer.py. It stays where it has always been: the settings of saved runs name it.
BYTE_TOKENIZER_PATH: str = str(Path(__file__).absolute().parents[1] / "byte_tokenizer")


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """Load the tokenizer in `model.hf_assets_path`.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no tokenizer.
    """
    tokenizer = HuggingFaceTokenizer(job_config.model.hf_assets_path)
    # A web page that spells out "<|end_of_text|>" must not end the document: in text, special tokens are
    # plain characters. BOS and EOS come from `encode(add_bos=True, add_eos=True)`, which adds them by id.
    tokenizer.tokenizer.encode_special_tokens = True
    end = (tokenizer.config or {}).get("eos_token")
    if tokenizer.eos_id is None and (end["content"] if isinstance(end, dict) else end) == tokenizer.bos_token:
        # One token for both, as GPT-2 has: upstream takes it for the beginning alone.
        tokenizer.eos_token, tokenizer.eos_id = tokenizer.bos_token, tokenizer.bos_id
    return tokenizer


def check_ends(tokenizer: HuggingFaceTokenizer, folder: str) -> None:
    """Whether each document gets a token at its beginning and at its end, so that none runs into the next one.

    Raises:
        Refused: naming what is missing, and what to write where.
    """
    tokens = tokenizer.encode("a", add_bos=True, add_eos=True)
    for name, words, token, found in (
        ("bos_token", "beginning", tokenizer.bos_id, tokens[:1]),
        ("eos_token", "end", tokenizer.eos_id, tokens[-1:]),
    ):
        if token is not None and found == [token]:
            continue
        others = [tokenizer.eos_token, tokenizer.bos_token, *_special_tokens(tokenizer)]
        nearest = next((other for other in others if other), "<|endoftext|>")
        raise Refused(
            f"model.hf_assets_path={folder!r}: its tokenizer puts no token at the {words} of a document, and documents "
            f"would run together; nearest valid value: a copy of the folder with "
            f"{json.dumps({name: nearest})[1:-1]} in its tokenizer_config.json"
        )


def _special_tokens(tokenizer: HuggingFaceTokenizer) -> list[str]:
    return [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values() if token.special]


def utf8_bytes(tokens: list[int], tokenizer: HuggingFaceTokenizer) -> int:
    """UTF-8 bytes of the text that ``tokens`` stand for; begin and end of text stand for none.

    A byte tokenizer's tokens are counted, not decoded: they may begin within a character. Elsewhere a character that
    is cut by their edge counts as the three bytes of the replacement character.
    """
    special = {tokenizer.bos_id, tokenizer.eos_id}
    words = [token for token in tokens if token not in special]
    if tokenizer.get_vocab_size() - len(special) == 256:
        return len(words)
    return len(tokenizer.tokenizer.decode(words).encode())


def tokenizer_files(folder: Path) -> list[Path]:
    """The files there that upstream's tokenizer reads, and that decide what tokens a text has."""
    whole = (folder / "tokenizer.json").is_file()
    names = ("tokenizer.json",) if whole else ("vocab.json", "vocab.txt", "merges.txt")
    return [file for name in (*names, "tokenizer_config.json") if (file := folder / name).is_file()]
