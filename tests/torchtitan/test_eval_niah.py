import csv
import json
import re
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from torchtitan.experiments.lighthouse import eval_niah
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.evaluation import needle
from torchtitan.experiments.lighthouse.evaluation.needle import CONTEXTS, DEPTHS, Cell, Haystack, Subject
from torchtitan.experiments.lighthouse.runs import settings as run_settings

from helpers.launch import REPOSITORY, run_ranks, train

SCRIPT = REPOSITORY / "scripts/eval_niah.py"
BYTES = Tokenizer.from_file(f"{BYTE_TOKENIZER_PATH}/tokenizer.json")
BEGIN = 256
NEEDLE, ASKED = " The passkey is {}. ", " The passkey is "


def encode(text):
    return BYTES.encode(text).ids


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack.of(encode, [BEGIN])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One step through Lighthouse at 1,024 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    train(folder, training__steps="1")
    return folder / "checkpoint/step-1"


def evaluate(model, haystack, contexts=(256, 512), depths=DEPTHS, **settings):
    settings = {"seed": 0, "batch_tokens": 1024, "device": torch.device("cpu")} | settings
    return needle.evaluate(model, haystack, list(contexts), list(depths), **settings)


def retriever(last=None, shift=0):
    """A model that reads the digit after the sentence's beginning, in the ``last`` tokens only, and adds ``shift``."""

    def logits(tokens):
        out = torch.zeros(len(tokens), 320)
        for row, prompt in zip(out, tokens, strict=True):
            text = BYTES.decode(prompt[-(last or len(prompt)) :].tolist())
            _, found, after = text.partition(ASKED)
            if found and after:
                row[ord(str((int(after[0]) + shift) % 10))] = 1
        return out

    return logits


@pytest.mark.parametrize("context", [36, 512, 4096])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_prompt_has_its_length_its_needle_and_its_question(context, depth, haystack):
    for digit in range(10):
        prompt = haystack.prompt(context, depth, digit, seed=0)
        assert len(prompt) == context and prompt[0] == BEGIN
        text, needle = BYTES.decode(prompt[1:]), NEEDLE.format(digit)
        assert text.endswith(ASKED) and text.count(needle) == 1 and text.count(ASKED) == 2
        before, after = text.removesuffix(ASKED).split(needle)
        assert abs(len(before) - depth / 100 * len(before + after)) <= 0.5
        assert (before + after).isalnum() or context == haystack.min_context
        assert (before == "", after == "") == (depth == 0, depth == 100) or context == haystack.min_context


def test_the_shortest_prompt_is_all_needle(haystack):
    assert haystack.min_context == 1 + 19 + 16
    assert BYTES.decode(haystack.prompt(36, 50, 3, seed=0)[1:]) == NEEDLE.format(3) + ASKED


def test_filler_is_letters_and_digits_alike(haystack):
    counts = Counter(BYTES.decode(haystack.prompt(32768, 0, 0, seed=0)[20:-16]))
    assert len(counts) == 62
    expected = 32732 / 62
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def test_prompts_depend_on_seed_context_depth_and_digit_alone(haystack):
    places = [(512, 0, 0), (512, 0, 1), (512, 15, 0), (513, 0, 0)]
    prompts = [haystack.prompt(*place, seed=seed) for seed in (0, 1) for place in places]
    assert len(set(map(tuple, prompts))) == 8
    fillers = {BYTES.decode(prompt[1:-16]).replace(ASKED, "")[-40:] for prompt in prompts}
    assert len(fillers) == 8
    assert [haystack.prompt(*place, seed=seed) for seed in (0, 1) for place in reversed(places)][3] == prompts[0]


def test_a_tokenizer_may_join_the_space_and_the_digit():
    """As GPT-2's does: the question then ends before the space. (Words with their space, ids from 1000.)"""
    words: dict[str, int] = {}

    def joining(text):
        pieces = text.replace(". ", " .").split(" ")
        return [words.setdefault(piece, 1000 + len(words)) for piece in pieces]

    haystack = Haystack.of(joining, [])
    assert haystack.question == [words[piece] for piece in ("", "The", "passkey", "is")]
    assert haystack.digits == [words[str(digit)] for digit in range(10)]
    prompt = haystack.prompt(100, 50, 7, seed=0)
    assert len(prompt) == 100 and prompt[-4:] == haystack.question and prompt.count(words["7"]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda text: [0 if c.isdigit() else ord(c) for c in text],  # unknown to the vocabulary
        lambda text: [token for c in text for token in ([1, ord(c)] if c == "7" else [ord(c)])],  # two tokens
        lambda text: encode(text.replace("7.", "ü")),  # merged with what follows
    ],
)
def test_a_digit_must_be_one_token(bad):
    with pytest.raises(Refused, match=r"no single token for the [07] in"):
        Haystack.of(bad, [])


def test_scores_of_models_whose_score_is_known(haystack):
    def accuracies(model, **settings):
        return [cell.accuracy for cell in evaluate(model, haystack, **settings)]

    assert accuracies(retriever()) == [1.0] * 14
    assert accuracies(retriever(shift=1)) == [0.0] * 14
    for constant in range(10):
        one_hot = torch.nn.functional.one_hot(torch.tensor(ord(str(constant))), 320)
        assert accuracies(lambda tokens, row=one_hot: row.expand(len(tokens), -1)) == [0.1] * 14
    # Digits are compared with one another only.
    assert accuracies(lambda tokens: retriever()(tokens).index_fill(1, torch.tensor([65, 257]), 9.0)) == [1.0] * 14


def test_a_model_that_sees_the_end_only_finds_the_needles_there(haystack):
    """The last 150 tokens: of 256, depths from 50 %, of 512, from 85 %. Otherwise every digit ties: 0 is answered."""
    cells = evaluate(retriever(last=150), haystack)
    assert [(cell.context, cell.depth) for cell in cells] == [(n, depth) for n in (256, 512) for depth in DEPTHS]
    assert [cell.correct for cell in cells] == [1, 1, 1, 10, 10, 10, 10, 1, 1, 1, 1, 1, 10, 10]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_cells_of_a_context(ranks, haystack, monkeypatch, capsys):
    """Threads in place of processes: every rank has all results, in order; no cell is run twice."""
    alone = evaluate(retriever(last=150), haystack)
    printed = capsys.readouterr().out
    local, barrier, gathered, seen = threading.local(), threading.Barrier(ranks, timeout=20), [None] * ranks, []

    def all_gather_object(out, mine):
        gathered[local.rank] = mine
        barrier.wait()
        out[:] = gathered
        barrier.wait()

    def work(rank):
        local.rank = rank
        return evaluate(lambda tokens: seen.append(len(tokens)) or retriever(last=150)(tokens), haystack)

    fake = {"is_initialized": lambda: True, "get_rank": lambda: local.rank, "get_world_size": lambda: ranks}
    for name, function in (fake | {"all_gather_object": all_gather_object}).items():
        monkeypatch.setattr(torch.distributed, name, function)
    with ThreadPoolExecutor(ranks) as pool:
        assert list(pool.map(work, range(ranks))) == [alone] * ranks
    assert sum(seen) == len(alone) * 10
    without_time = [re.sub(r"\(.*? s\)", "", text) for text in (printed, capsys.readouterr().out)]
    assert without_time[0] == without_time[1]  # one rank prints


@pytest.mark.parametrize(("batch_tokens", "batches"), [(1, [1] * 10), (1024, [4, 4, 2]), (10**6, [10])])
def test_batches_hold_so_many_tokens_and_the_same_prompts(batch_tokens, batches, haystack):
    seen = []
    evaluate(
        lambda tokens: seen.append(tokens) or retriever()(tokens), haystack, [256], [30], batch_tokens=batch_tokens
    )
    assert [len(tokens) for tokens in seen] == batches
    assert torch.cat(seen).tolist() == [haystack.prompt(256, 30, digit, seed=0) for digit in range(10)]


def test_logits_that_are_not_finite_are_no_answer(haystack):
    with pytest.raises(FloatingPointError, match="256 tokens, depth 30 %"):
        evaluate(lambda tokens: retriever()(tokens) / 0, haystack, [256], [30])


def test_the_last_position_is_the_whole_forwards(checkpoint):
    settings = run_settings.read_settings(checkpoint)
    model = run_settings.load_model(checkpoint, settings, dense=True, device="cpu")
    tokens = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0))
    rows = []
    model.norm.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape))
    with torch.no_grad():
        got, want = needle.last_logits(model, tokens), model(tokens)[:, -1]
    assert rows[0] == (2, 128)  # one position a prompt is projected
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def read_table(folder: Path) -> list[dict]:
    with (folder / "niah.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_whole_run_on_one_process_and_two(checkpoint, tmp_path, capsys):
    words = ["--contexts", "512,256", "--seed", "3", "--depths", "0,100"]
    stage1 = checkpoint.parent.parent
    eval_niah.main([str(stage1), *words])
    printed = capsys.readouterr().out
    assert "512 tokens" in printed and str(stage1 / "niah/niah.png") in printed

    table = read_table(stage1 / "niah")
    places = [(int(row["context"]), int(row["depth"])) for row in table]
    assert places == [(n, depth) for n in (256, 512) for depth in (0, 100)]
    assert all(float(row["accuracy"]) == int(row["correct"]) / int(row["trials"]) for row in table)
    report = json.loads((stage1 / "niah/niah.json").read_text())
    assert report["model"] == str(checkpoint.resolve())
    assert report["settings"] == {
        "contexts": [256, 512], "depths": [0, 100], "trials": 10, "seed": 3, "batch_tokens": 32768
    }  # fmt: skip
    assert report["mean"] == pytest.approx(sum(cell["correct"] for cell in report["cells"]) / 40)
    assert report["cells"] == [{key: json.loads(value) for key, value in row.items()} for row in table]
    assert (stage1 / "niah/niah.png").read_bytes().startswith(b"\x89PNG")

    result = run_ranks(SCRIPT, 2, str(checkpoint), *words)
    assert (stage1 / "niah-step-1/niah.csv").read_bytes() == (stage1 / "niah/niah.csv").read_bytes()
    assert result.stdout.count("512 tokens") == 1


def test_a_hugging_face_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(BYTE_TOKENIZER_PATH, tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")

    subject = needle.open_subject(tmp_path / "model")
    haystack = Haystack.of(subject.encode, subject.begin)
    prompts = torch.tensor([haystack.prompt(512, 50, digit, seed=0) for digit in (3, 7)])
    assert BYTES.decode(prompts[1, 1:].tolist()).count(NEEDLE.format(7)) == 1 and prompts[1, 0] == BEGIN
    with torch.no_grad():
        got, want = subject.load(torch.device("cpu"))(prompts), model(prompts).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    eval_niah.main([str(tmp_path / "model"), "--contexts", "512", "--depths", "0", "--output", str(tmp_path / "out")])
    assert len(read_table(tmp_path / "out")) == 1
    with pytest.raises(SystemExit, match="max_position_embeddings=512; largest valid value: 512"):
        eval_niah.main([str(tmp_path / "model"), "--contexts", "513"])


def test_a_tokenizer_that_adds_begin_of_text_by_itself(checkpoint, tmp_path):
    """As Llama 3's does: the prompt has one, at its start."""
    begin = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BEGIN)])
    adding = Tokenizer.from_str(BYTES.to_str())
    adding.post_processor = begin
    assert adding.encode("a").ids == [BEGIN, 97]
    run_folder = shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    shutil.copytree(BYTE_TOKENIZER_PATH, tmp_path / "tokenizer")
    adding.save(str(tmp_path / "tokenizer/tokenizer.json"))
    config = json.loads((run_folder / "config.json").read_text())
    config["model"]["hf_assets_path"] = str(tmp_path / "tokenizer")
    (run_folder / "config.json").write_text(json.dumps(config))

    subject = needle.open_subject(run_folder)
    prompt = Haystack.of(subject.encode, subject.begin).prompt(512, 50, 7, seed=0)
    assert prompt[0] == BEGIN and prompt.count(BEGIN) == 1


def test_without_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="needs transformers: pip install"):
        eval_niah.main([str(tmp_path)])


def test_refusals(checkpoint, tmp_path):
    for words, message in (
        ((), r"context of 1024 tokens \(training.seq_len\) is shorter than the paper's shortest, 4096"),
        (("--contexts", "512,2048"), "2048: must be at most .*training.seq_len=1024; largest valid value: 1024"),
        (("--contexts", "35"), "--contexts 35: .* smallest valid value: 36"),
        (("--contexts", "512", "--depths", "0,101"), "--depths 101: .* nearest valid value: 100"),
        (("--contexts", "512", "--depths=-1"), "--depths -1: .* nearest valid value: 0"),
        (("--contexts", "512", "--batch-tokens", "0"), "--batch-tokens 0: .* nearest valid value: 1"),
    ):
        with pytest.raises(SystemExit, match=f"^eval_niah: .*{message}"):
            eval_niah.main([str(checkpoint), *words, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^eval_niah: .*absent: no such folder"):
        eval_niah.main([str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="neither a run's dump folder nor a checkpoint"):
        eval_niah.main([str(tmp_path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("limit", "contexts"), [(98304, 6), (40000, 4), (4096, 1), (None, 6)])
def test_default_contexts_are_the_papers_that_the_model_reaches(limit, contexts, tmp_path):
    subject = Subject(tmp_path, tmp_path, limit, "training.seq_len", encode, [], load=None)
    assert needle.choose_contexts(None, subject, shortest=36) == list(CONTEXTS[:contexts])


def test_figure_of_every_size(tmp_path):
    for contexts, depths in (((512,), (50,)), (CONTEXTS, DEPTHS)):
        cells = [Cell(context, depth, correct=(i + j) % 11) for i, context in enumerate(contexts)
                 for j, depth in enumerate(depths)]  # fmt: skip
        needle.draw(cells, "a/long/path" * 20, tmp_path / "niah.png")
        assert (tmp_path / "niah.png").stat().st_size > 5000
