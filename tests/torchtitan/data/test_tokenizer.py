"""The shipped byte tokenizer, loaded as a run loads it."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data.sources import encodable_text
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer, check_ends
from torchtitan.experiments.lighthouse.errors import Refused

BOS, EOS = 256, 257
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "build_byte_tokenizer.py"


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    job_config = JobConfig()
    job_config.model.hf_assets_path = BYTE_TOKENIZER_PATH
    return build_tokenizer(job_config)


def random_text(seed: int, length: int = 2000) -> str:
    """Code points of every plane, surrogates left out, with runs of ASCII between them."""
    rng = random.Random(seed)
    ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def test_vocabulary_is_256_bytes_and_two_specials(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.get_vocab_size() == 258
    assert sorted(tokenizer.get_vocab().values()) == list(range(258))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, EOS)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


@pytest.mark.parametrize("text", ["", " ", "plain", "\r\n\t\0", "naïve café", "日本語", "👩‍👩‍👧 𝔘𝔫𝔦", "  two  spaces "])
def test_ids_are_the_utf8_bytes(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("seed", range(5))
def test_random_unicode_survives_the_round_trip(tokenizer: HuggingFaceTokenizer, seed: int) -> None:
    text = random_text(seed)
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids == [BOS, *text.encode(), EOS]
    assert tokenizer.decode(ids) == text


def test_bos_and_eos_come_when_asked_for(tokenizer: HuggingFaceTokenizer) -> None:
    # A document gets both, a prompt (upstream's default arguments) begins and does not end.
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [BOS, 97, EOS]
    assert tokenizer.encode("a", add_bos=False, add_eos=False) == [97]
    assert tokenizer.encode("a") == [BOS, 97]
    # Upstream must not take the tokenizer for one that adds them by itself: it would leave them out.
    assert not tokenizer.hf_adds_bos and not tokenizer.hf_adds_eos


@pytest.mark.parametrize("literal", ["<|end_of_text|>", "<|begin_of_text|>"])
def test_a_special_token_spelled_out_in_text_stays_text(tokenizer: HuggingFaceTokenizer, literal: str) -> None:
    text = f"see {literal} and {literal}"
    assert tokenizer.encode(text, add_bos=True, add_eos=True) == [BOS, *text.encode(), EOS]
    # The plain upstream tokenizer does cut the document there: the setting is needed.
    upstream = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    assert not {BOS, EOS}.isdisjoint(upstream.encode(text, add_bos=False, add_eos=False))


def test_lone_surrogates_are_replaced_before_the_tokenizer(tokenizer: HuggingFaceTokenizer) -> None:
    for record in (r'{"text": "a\ud800b"}', r'{"text": "a\udfffb"}'):
        text = encodable_text(json.loads(record))
        assert text == "a?b"
        assert tokenizer.encode(text, add_bos=False, add_eos=False) == list(b"a?b")
    assert encodable_text(json.loads(r'{"text": "\ud83d\ude00"}')) == "😀"


@pytest.mark.parametrize("seed", range(5))
def test_any_ids_decode_without_an_error(tokenizer: HuggingFaceTokenizer, seed: int) -> None:
    ids = random.Random(seed).choices(range(258), k=500)
    text = tokenizer.decode(ids)
    assert text and text == bytes(token for token in ids if token < 256).decode(errors="replace")


def test_time_grows_linearly_with_the_text(tokenizer: HuggingFaceTokenizer) -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        tokenizer.encode(text, add_bos=True, add_eos=True)
        return time.process_time() - start

    words = random_text(0, 25_000) + "word " * 40_000
    small = min(seconds(words) for _ in range(3))
    large = min(seconds(words * 4) for _ in range(2))
    # A quadratic tokenizer needs 16 times as long.
    assert large < 10 * small


def test_the_script_writes_what_is_shipped(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--output", tmp_path / "new"], check=True)
    for read in (
        lambda folder: Tokenizer.from_file(str(folder / "tokenizer.json")).to_str(),
        lambda folder: json.loads((folder / "tokenizer_config.json").read_text()),
    ):
        assert read(tmp_path / "new") == read(Path(BYTE_TOKENIZER_PATH))


def folder_with(folder: Path, **ends: str | None) -> HuggingFaceTokenizer:
    """The shipped tokenizer without its own ends, or with others."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((Path(BYTE_TOKENIZER_PATH) / name).read_text())
        (folder / name).write_text(json.dumps(content | ends if "config" in name else content))
    job_config = JobConfig()
    job_config.model.hf_assets_path = str(folder)
    return build_tokenizer(job_config)


@pytest.mark.parametrize(
    ("ends", "missing", "nearest"),
    [
        ({"bos_token": None}, "beginning", '"bos_token": "<|end_of_text|>"'),
        ({"eos_token": None}, "end", '"eos_token": "<|begin_of_text|>"'),
        ({"bos_token": None, "eos_token": None}, "beginning", '"bos_token": "<|begin_of_text|>"'),
    ],
)
def test_a_tokenizer_that_does_not_divide_documents_is_refused_with_a_remedy(tmp_path, ends, missing, nearest) -> None:
    with pytest.raises(Refused, match=f"puts no token at the {missing} of a document, .*value: a copy .*") as refused:
        check_ends(folder_with(tmp_path, **ends), "here")
    assert f"with {nearest} in its tokenizer_config.json" in str(refused.value)
    key, value = nearest.replace('"', "").split(": ")
    remedied = ends | {key: value}
    if None not in remedied.values():
        check_ends(folder_with(tmp_path, **remedied), "here")


def test_one_token_may_be_both_ends(tmp_path) -> None:
    """As GPT-2's."""
    both = folder_with(tmp_path, bos_token="<|end_of_text|>", eos_token="<|end_of_text|>")
    check_ends(both, "here")
    assert both.encode("a", add_bos=True, add_eos=True) == [EOS, ord("a"), EOS]
