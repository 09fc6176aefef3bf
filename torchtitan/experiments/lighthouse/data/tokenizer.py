"""The tokenizer of a run: upstream's Hugging Face tokenizer, and where the shipped byte tokenizer lies."""

from pathlib import Path

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig

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
    return tokenizer


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
