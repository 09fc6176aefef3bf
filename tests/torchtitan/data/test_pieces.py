"""A long document in pieces has the tokens of the whole, whatever the tokenizer."""

import json
import random
from itertools import chain
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data import pieces
from torchtitan.experiments.lighthouse.data.pieces import PieceEncoder
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"

#: Llama 3's.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: What tokenizers treat in their own ways: contractions, runs of white space, marks that combine, and special tokens.
BITS = [
    *(
        "the",
        "The",
        "of",
        "ing",
        "we'll",
        "it's",
        "New",
        "York",
        "naïve",
        "nai\u0308ve",
        "1",
        "2025",
        "3.14",
        "日本語",
        "🙂",
    ),
    *(
        "\u0308",
        "\u00a0",
        "...",
        "(",
        '"',
        "_x",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "  ",
        "   ",
        " ",
        " ",
        " ",
        " ",
        BEGIN,
        END,
    ),
]


def text_of(seed: int, length: int = 3000) -> str:
    chance = random.Random(seed)
    return "".join(chance.choice(BITS) + " " * (chance.random() < 0.6) for _ in range(length))


def byte_level(merges_spaces: bool = False, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not merges_spaces)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def llama_3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = llama_3()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def prepending() -> Tokenizer:
    """Llama 2's way: no splitter, and a beginning like that of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = llama_3()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def saved(
    tokenizer: Tokenizer,
    folder: Path,
    frame: bool = False,
    names: list[str] | None = None,
    size: int = 700,
    text: str = "",
) -> HuggingFaceTokenizer:
    """Trained, and as upstream loads it, with begin and end from the tokenizer's own template or from upstream."""
    special = ["[UNK]", BEGIN, END]
    kind = trainers.WordPieceTrainer if isinstance(tokenizer.model, models.WordPiece) else trainers.BpeTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = kind(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text or text_of(0)], trainer)
    tokenizer.add_tokens(names or [])
    if frame:
        ids = [(name, tokenizer.token_to_id(name)) for name in (BEGIN, END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ids)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BEGIN, "eos_token": END}))
    loaded = HuggingFaceTokenizer(str(folder))
    loaded.tokenizer.encode_special_tokens = True
    return loaded


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 200)
    monkeypatch.setattr(pieces, "NEAR_END", 100)


def check(tokenizer: HuggingFaceTokenizer, text: str) -> int:
    """How many pieces there are, and that they have the tokens of the whole."""
    lists = list(PieceEncoder(tokenizer)(text))
    assert list(chain.from_iterable(lists)) == tokenizer.encode(text, add_bos=True, add_eos=True)
    return len(lists)


@pytest.mark.parametrize("frame", [False, True])
@pytest.mark.parametrize(
    "build",
    [byte_level, llama_3, composing, bert, lambda: byte_level(prefix=True), lambda: metaspace("first")],
)
def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path, build, frame: bool) -> None:
    tokenizer = saved(build(), tmp_path, frame)
    for seed in range(6):
        text = text_of(seed)
        assert check(tokenizer, text) > len(text) / 400
    assert check(tokenizer, "") == check(tokenizer, text[:200]) == 1
    assert check(tokenizer, "日本語" * 200) == 1


@pytest.mark.parametrize(
    "build", [prepending, stripping, lambda: byte_level(merges_spaces=True), lambda: metaspace("always")]
)
def test_a_tokenizer_that_cannot_be_cut_gets_documents_whole(tmp_path: Path, build) -> None:
    """Or in pieces where that makes no difference."""
    tokenizer = saved(build(), tmp_path, frame=True)
    for seed in range(6):
        check(tokenizer, text_of(seed))


def test_a_tokenizer_that_truncates_gets_documents_whole(tmp_path: Path) -> None:
    tokenizer = saved(llama_3(), tmp_path, frame=True)
    tokenizer.tokenizer.enable_truncation(50)
    assert check(tokenizer, text_of(1)) == 1


def test_the_byte_tokenizer_is_cut_anywhere() -> None:
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    tokenizer.tokenizer.encode_special_tokens = True
    text = text_of(1)
    assert check(tokenizer, text) == -(-len(text) // 200)
    assert check(tokenizer, "日本語🙂" * 1000) == 20
    # Where the text's special tokens are tokens, a cut may not be inside of one.
    tokenizer.tokenizer.encode_special_tokens = False
    assert check(tokenizer, BEGIN * 100) == 1


def test_a_token_with_a_space_in_it_is_not_cut(tmp_path: Path) -> None:
    """Tokens beside the model's are looked for before the splitter divides the text."""
    tokenizer = saved(llama_3(), tmp_path, names=["New York"])
    for start in range(12):
        assert check(tokenizer, "x" * start + " New York" * 500) > 10


def test_tokens_that_reach_across_words_are_not_cut(tmp_path: Path) -> None:
    """What is far away decides which words go together. The last merge is that of two words."""
    tokenizer = saved(byte_level(merges_spaces=True), tmp_path, size=264, text=" the" * 1000)
    assert " the the" in [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    for start in range(4):
        assert check(tokenizer, "x" * start + " the" * 777) == 1
