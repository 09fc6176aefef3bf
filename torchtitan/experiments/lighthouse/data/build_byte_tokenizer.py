"""Write the byte tokenizer that the package ships: 256 bytes, a begin and an end of text, no merges.

It needs no download and has no vocabulary to train: a token's id is the byte's value.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SHIPPED = Path(__file__).resolve().parents[1] / "byte_tokenizer"
BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"


def byte_characters() -> list[str]:
    """The character by which ByteLevel stands for each byte, by byte value.

    GPT-2's convention: printable Latin-1 stands for itself, other bytes take the code points from 256 on.
    """
    printable = {byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Splitting into words only serves merges; without any it costs more than twice the time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(content, special=True, normalized=False) for content in (BEGIN_OF_TEXT, END_OF_TEXT)]
    )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """What torchtitan and transformers read beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        # A prompt starts as every training document does, and does not end.
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # The bound is the model's, not the tokenizer's.
        "model_max_length": 10**30,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(content)): {
                "content": content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for content in (BEGIN_OF_TEXT, END_OF_TEXT)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=SHIPPED, help="folder (default: the shipped one)")
    output: Path = parser.parse_args().output

    tokenizer = build_tokenizer()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), indent=2) + "\n"
    (output / "tokenizer_config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()
