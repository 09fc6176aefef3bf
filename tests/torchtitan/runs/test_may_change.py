"""What a run may change when it goes on: settings by the table, files by their content. Nothing is trained here."""

import copy
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torchtitan.config.job_config import DataLoader
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.experiments.lighthouse.model.sizes import FLAVORS
from torchtitan.experiments.lighthouse.runs import contract, fingerprints, manifest, may_change, saving, stages
from torchtitan.experiments.lighthouse.runs.checkpoints import by_todays_names
from torchtitan.experiments.lighthouse.runs.may_change import RULES, Rule, rule_of
from torchtitan.experiments.lighthouse.settings_rules import check_settings

from helpers.settings import parse

REPOSITORY = Path(__file__).resolve().parents[3]
NOTHING: dict[str, Any] = {}


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with a run's data and tokenizer."""
    (tmp_path / "data/en").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "en/c.jsonl"):
        (tmp_path / "data" / name).write_text('{"text": "' + name * 50 + '"}\n')
    shutil.copytree(BYTE_TOKENIZER_PATH, tmp_path / "tokenizer")
    return tmp_path


@cache
def debug_settings():
    return parse("debug.toml")


def settings_in(here: Path, changed: dict[str, Any]):
    folders = {"training.dataset_path": "data", "model.hf_assets_path": "tokenizer", "job.dump_folder": "run"}
    wanted = {"training.dataset": "c4_local"} | {name: f"{here}/{at}" for name, at in folders.items()} | changed
    settings = copy.copy(debug_settings())
    for name, value in wanted.items():
        section, name = name.split(".")
        setattr(settings, section, replace(getattr(settings, section), **{name: value}))
    return settings


def save(here: Path, changed: dict[str, Any] = NOTHING, ranks: int = 1, prints: bool = True, without: str = "") -> Path:
    """As much of a checkpoint of such a run as says what it is of."""
    settings, folder = settings_in(here, changed), here / "run/checkpoint/step-4"
    folder.mkdir(parents=True, exist_ok=True)
    reads = fingerprints.of_run(settings) if prints else {}
    about = saving.about(settings, reads, stages.tokens_per_step(asdict(settings), ranks))
    about["settings"].pop(without, None)
    manifest.write(folder, {".metadata": manifest.FileRecord(0, "")}, about, step=4, last_of_stage=False)
    return folder


def resume(here: Path, changed: dict[str, Any] = NOTHING, ranks: int = 1) -> list[str]:
    settings = settings_in(here, changed)
    checkpoint = contract.to_resume(settings)
    assert checkpoint == here / "run/checkpoint/step-4"
    return contract.check_resume(checkpoint, settings, ranks, fingerprints.of_run(settings))


def test_another_folder_of_checkpoints_does_not_start_the_run_over(here):
    """Unless that is allowed, or nothing has been saved."""
    elsewhere = {"checkpoint.folder": "saves"}
    config = here / "run/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(asdict(settings_in(here, NOTHING))))
    assert contract.to_resume(settings_in(here, elsewhere)) is None
    save(here)
    with pytest.raises(
        Refused, match=r"^checkpoint\.folder='saves': .* saved checkpoint/step-4: .* value: 'checkpoint'"
    ):
        contract.to_resume(settings_in(here, elsewhere))
    for harmless in ({"checkpoint.allow_changed": ["checkpoint.folder"]}, {"checkpoint.enable": False}):
        assert contract.to_resume(settings_in(here, elsewhere | harmless)) is None
    config.write_text("")  # cut short by a crash: nothing is known
    assert contract.to_resume(settings_in(here, elsewhere)) is None


# Settings


def test_every_setting_is_decided_on():
    """By its name, or its section's; a new one of upstream's in [training] fails here."""
    known = [name for name, _ in may_change.flat(asdict(parse("debug.toml")))]
    undecided = [name for name in known if not any(name == rule or name.startswith(f"{rule}.") for rule in RULES)]
    assert not undecided and len(known) > 150
    # And nothing else is: a misspelled rule would decide nothing.
    assert [rule for rule in RULES if not any(name == rule or name.startswith(f"{rule}.") for name in known)] == []


ALLOW = "checkpoint.allow_changed"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lighthouse.top_k": 256}, "lighthouse.top_k 128 → 256"),
        ({"lighthouse.num_levels": 2}, "lighthouse.num_levels 3 → 2"),
        ({"lighthouse.selection": "causal"}, "lighthouse.selection 'published' → 'causal'"),
        ({"lighthouse.local_window": 128}, "lighthouse.local_window 0 → 128"),
        ({"lighthouse.combine": "softmax"}, "lighthouse.combine 'sum' → 'softmax'"),
        ({"lighthouse.dense_every": 4}, "lighthouse.dense_every 0 → 4"),
        ({"lighthouse.enable": False}, "lighthouse.enable True → False"),
        ({"lighthouse.layers": "1"}, "lighthouse.layers '1--2' → '1'"),
        ({"training.seq_len": 1024, "training.global_batch_size": 8}, "training.seq_len 2048 → 1024"),
        ({"training.dtype": "bfloat16"}, "training.dtype 'float32' → 'bfloat16'"),
        ({"training.dataset": "c4_local_validation"}, "training.dataset 'c4_local' → 'c4_local_validation'"),
        ({"training.shuffle_buffer": 9}, "training.shuffle_buffer 0 → 9"),
        ({"training.data_seed": 1}, "training.data_seed 0 → 1"),
        ({"training.held_out_share": 0.01}, "training.held_out_share None → 0.01"),
        ({"training.min_document_chars": 9}, "training.min_document_chars 0 → 9"),
        ({"model.flavor": "debug_gqa"}, "model.flavor 'debug' → 'debug_gqa'"),
        ({"debug.seed": 7}, "debug.seed 0 → 7"),
    ],
)
def test_what_makes_it_another_run_is_refused_and_can_be_allowed(changed, said, here):
    start = {
        "training.seq_len": 2048, "training.global_batch_size": 4, "lighthouse.top_k": 128, "lighthouse.layers": "1--2",
        "debug.seed": 0,
    }  # fmt: skip
    save(here, start)
    (here / "data/validation.jsonl").write_text("")  # not read: no change
    name = said.split()[0]
    message = f"{said}: {here}/run/checkpoint/step-4 was trained otherwise, and this would be another run. Choose "
    with pytest.raises(Refused, match=f"^{re.escape(message)}.*: --checkpoint.allow_changed {name}$"):
        resume(here, start | changed)
    assert resume(here, start | changed | {ALLOW: [name]}) == [f"Not as in the checkpoint: {said}"]


SIZES = {f"llama.{name}": value for name, value in asdict(FLAVORS["debug"]).items()}


@pytest.mark.parametrize("without", ["", "llama"])
def test_the_sizes_of_the_model_are_compared_as_numbers(without, here):
    """Also with those of an older version's run, which are its flavor's."""
    save(here, SIZES, without=without)
    assert resume(here, SIZES | {"model.hf_config": "/elsewhere"}) == []
    # All in one: what may change in the next stage, and what may not.
    changed = SIZES | {"llama.ffn_dim": 256, "llama.rope_theta": 500000.0}
    with pytest.raises(Refused, match=r"^llama\.ffn_dim 384 → 256; llama\.rope_theta 10000\.0 → 500000\.0: "):
        resume(here, changed)
    assert rule_of("llama.ffn_dim") in may_change.IN_NEXT_STAGE
    assert rule_of("llama.rope_theta") not in may_change.IN_NEXT_STAGE


def test_all_that_differs_is_named_and_allowed_together(here):
    save(here)
    changed = {"lighthouse.top_k": 256, "debug.seed": 3, "training.max_norm": 0.5}
    with pytest.raises(Refused, match=r"^debug\.seed .* → 3; lighthouse\.top_k .* → 256: ") as refusal:
        resume(here, changed)
    names = str(refusal.value).rpartition(" ")[2]
    assert names == "debug.seed,lighthouse.top_k"
    assert len(resume(here, changed | {ALLOW: names.split(",")})) == 3
    with pytest.raises(Refused, match=r"^debug\.seed .* → 3: "):
        resume(here, changed | {ALLOW: ["lighthouse.top_k"]})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"training.max_norm": 0.5}, ["training.max_norm 1.0 → 0.5"]),
        ({"optimizer.lr": 1e-4, "optimizer.beta2": 0.9},
         ["optimizer.lr 0.002 → 0.0001", "optimizer.beta2 0.95 → 0.9"]),
        ({"lr_scheduler.total_steps": 50}, ["lr_scheduler.total_steps 20 → 50"]),
        ({"training.steps": 15}, []),
        ({"metrics.log_freq": 7, "checkpoint.interval": 3, "compile.enable": True, "lighthouse.backend": "torch"}, []),
        ({"lighthouse.inner_attention": "flash"}, []),
        ({"activation_checkpoint.mode": "full", "training.dataloader": DataLoader(num_workers=2)}, []),
        ({"validation.enable": True, "validation.seq_len": 512, "debug.deterministic": True}, []),
        ({"lighthouse.stage": 2, "lighthouse.stage1_checkpoint": "/elsewhere", "job.description": "x"}, []),
        ({"lighthouse.layers": "1-4"}, []),  # the same of six
    ],
)  # fmt: skip
def test_what_may_change(changed, said, here):
    start = {
        "lr_scheduler.total_steps": 20, "training.steps": 10, "optimizer.lr": 0.002, "lighthouse.layers": "1--2",
    }  # fmt: skip
    save(here, start)
    assert resume(here, start | changed) == [f"Not as in the checkpoint: {line}" for line in said]


def test_what_was_allowed_and_has_not_changed_is_said(here):
    """It is no error: the same command starts a run again."""
    save(here)
    assert resume(here, {ALLOW: ["debug.seed"]}) == [
        "checkpoint.allow_changed: debug.seed need not be there: nothing has to be allowed"
    ]


def test_a_schedule_that_follows_the_steps_is_said_to(here):
    save(here, {"training.steps": 10, "lr_scheduler.total_steps": None})
    lines = resume(here, {"training.steps": 15, "lr_scheduler.total_steps": None})
    assert lines == ["Not as in the checkpoint: lr_scheduler.total_steps 10 → 15"]


def test_in_a_dense_run_the_geometry_decides_nothing(here):
    save(here, {"lighthouse.enable": False})
    assert resume(here, {"lighthouse.enable": False, "lighthouse.top_k": 256}) == []


def test_a_step_has_as_many_tokens_whoever_trains_it(here):
    """-1 follows the processes."""
    length = {"training.seq_len": 2048}

    def batch(local: int, together: int = -1) -> dict[str, int]:
        return length | {"training.local_batch_size": local, "training.global_batch_size": together}

    save(here, batch(2), ranks=2)
    assert resume(here, batch(1), ranks=4) == resume(here, batch(1, 4)) == []
    degrees = {"parallelism.context_parallel_degree": 2}
    assert resume(here, batch(2) | degrees, ranks=4) == []
    kept = r"makes 8,192 tokens per step → 4,096 \(training.global_batch_size 4 keeps them\): "
    with pytest.raises(Refused, match=f"^training.global_batch_size {kept}"):
        resume(here, batch(2))
    with pytest.raises(Refused, match=r"8,192 tokens per step → 16,384 "):
        resume(here, batch(1, 8))
    assert resume(here, batch(1, 8) | {ALLOW: ["training.global_batch_size"]})
    with pytest.raises(Refused, match=r"^training.seq_len 2048 → 1024; training.global_batch_size makes 8,192 "):
        resume(here, batch(2) | {"training.seq_len": 1024}, ranks=2)


def test_what_an_older_version_has_not_said_is_not_compared(here):
    """A setting that it did not have had its default. Without a manifest, the run's own file says what it says."""
    start = {"training.seq_len": 2048, "training.global_batch_size": 4}
    checkpoint = save(here, start, prints=False)
    saved = manifest.read(checkpoint)["settings"]
    del saved["lighthouse"]["local_window"], saved["lighthouse"]["selection"], saved["checkpoint"]["allow_changed"]
    (checkpoint / ".metadata").touch()
    silent = f"{checkpoint} does not say with which settings it was trained: they are not compared"
    manifest.write(checkpoint, {".metadata": manifest.FileRecord(0, "")}, {}, step=4, last_of_stage=False)
    assert resume(here, start) == [silent]  # another program's manifest, without settings
    (checkpoint / "manifest.json").unlink()
    assert resume(here, start) == [silent]
    (here / "run/config.json").write_text(json.dumps(saved | {"gone": {"a": 1}}))
    assert resume(here, start) == []
    (here / "data/b.jsonl").unlink()
    assert resume(here, start) == []
    with pytest.raises(Refused, match=r"lighthouse\.local_window 0 → 128"):
        resume(here, start | {"lighthouse.local_window": 128})
    with pytest.raises(Refused, match="8,192 tokens per step → 4,096"):
        resume(here, start | {"training.global_batch_size": 2})
    # Another path: what lies at the first one, while it does.
    elsewhere = start | {"training.dataset_path": str(shutil.copytree(here / "data", here / "copy"))}
    assert resume(here, elsewhere) == []
    (here / "data/a.jsonl").write_text("")
    with pytest.raises(Refused, match=r"dataset_path \(.*/copy\) is not as it was: a.jsonl had 0 bytes, and has 363"):
        resume(here, elsewhere)
    shutil.rmtree(here / "data")
    with pytest.raises(Refused, match=r"training\.dataset_path '.*/data' → '.*/copy': "):
        resume(here, elsewhere)


def test_allow_changed_names_settings():
    with pytest.raises(Refused, match=r"'lighthouse\.topk' is no setting; nearest valid value: 'lighthouse\.top_k'"):
        check_settings(parse("debug.toml", "--checkpoint.allow_changed=debug.seed,lighthouse.topk"))
    check_settings(parse("debug.toml", "--checkpoint.allow_changed=debug.seed,lighthouse.top_k"))
    settings = parse("debug.toml")
    settings.checkpoint.allow_changed = "debug.seed"  # as a TOML file may have it
    with pytest.raises(Refused, match=r"must be a list; nearest valid value: \['debug\.seed'\]"):
        check_settings(settings)


def test_the_documentation_names_what_is_refused():
    text = (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8")
    section = text.partition("## Settings on resume")[2].partition("\n## ")[0]
    for name, rule in RULES.items():
        if rule is not Rule.FREE:
            assert f"`{name}`" in section or (f"`[{name}]`" in section and "." not in name), name
    assert rule_of("lighthouse.a_new_one") is Rule.STAGE and rule_of("a_users_own.setting") is Rule.FREE


# Content


def remove(data: Path) -> None:
    (data / "b.jsonl").unlink()


def edit(data: Path) -> None:
    (data / "b.jsonl").write_text((data / "b.jsonl").read_text().replace("b.j", "b_j", 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, "b.jsonl is not there any more"),
        (lambda data: (data / "ab.jsonl").write_text("{}"), "ab.jsonl is new"),
        (lambda data: os.truncate(data / "en/c.jsonl", 100), "en/c.jsonl had 513 bytes, and has 100"),
        (edit, "b.jsonl holds another text than before"),
        (lambda data: (data / "b.jsonl").rename(data / "en/b.jsonl"),
         "b.jsonl is not there any more, and 1 more difference(s)"),
    ],
)  # fmt: skip
def test_data_that_is_not_as_it_was_is_named(change, said, here):
    save(here)
    change(here / "data")
    message = f"training.dataset_path ({here}/data) is not as it was: {said}"
    with pytest.raises(Refused, match=f"^{re.escape(message)}: .*--checkpoint.allow_changed training.dataset_path$"):
        resume(here)
    allowed = resume(here, {ALLOW: ["training.dataset_path"]})
    assert allowed == [f"Not as in the checkpoint: {message}"]


def test_a_tokenizer_that_was_edited_is_named(here):
    """Wherever in its files; and what else lies there is not looked at."""
    save(here)
    file = here / "tokenizer/tokenizer.json"
    (here / "tokenizer/model.safetensors").write_text("weights")
    assert resume(here) == []
    whole = file.read_bytes()
    for at in (10, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
        with pytest.raises(
            Refused, match=r"^model.hf_assets_path \(.*\) is not as it was: tokenizer.json holds another"
        ):
            resume(here)
    file.write_bytes(whole)
    (here / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(Refused, match=r"tokenizer_config\.json is not there any more"):
        resume(here)


def test_folders_with_the_same_content_may_lie_anywhere(here):
    save(here)
    moved = here.with_name("elsewhere")
    here.rename(moved)
    assert resume(moved) == []
    remove(moved / "data")
    with pytest.raises(Refused, match=r"b\.jsonl is not there any more"):
        resume(moved)


def test_the_shipped_tokenizer_is_found_where_another_installation_has_it(here):
    """Its path was saved as the default of that one."""
    elsewhere = "/gone/site-packages/torchtitan/experiments/lighthouse/byte_tokenizer"
    for path, found in ((elsewhere, BYTE_TOKENIZER_PATH), ("/gone/byte_tokenizer", "/gone/byte_tokenizer")):
        assert by_todays_names({"model": {"hf_assets_path": path}})["model"]["hf_assets_path"] == found


def test_a_fingerprint_is_cheap_for_large_files(tmp_path):
    """64 GiB, which take minutes to read. Both ends count, and the size."""
    file = tmp_path / "large.jsonl"
    with file.open("wb") as stream:
        stream.truncate(1 << 36)

    def look() -> dict:
        return fingerprints.of_files([str(file)], str(tmp_path))

    first = look()
    for at in (0, (1 << 36) - 1):
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"x")
        second, first = first, look()
        assert fingerprints.difference(second, first) == "large.jsonl holds another text than before"
    with file.open("r+b") as stream:
        stream.truncate((1 << 36) + 1)
    assert "bytes, and has 68,719,476,737" in fingerprints.difference(first, look())


def test_of_very_many_files_all_sizes_and_some_contents_count(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "MOST_CONTENTS", 10)
    files = [tmp_path / f"{number:03}.jsonl" for number in range(200)]
    for file in files:
        file.write_text("text")

    def look(files=files) -> dict:
        return fingerprints.of_files([str(file) for file in files], str(tmp_path))

    before = look()
    assert before["files"] == 200 and before["bytes"] == 800
    names = list(before["contents"])
    assert len(names) == 10 and names[0] == "000.jsonl" and names[-1] == "199.jsonl"
    assert fingerprints.difference(before, look()) is None
    files[199].write_text("test")
    assert fingerprints.difference(before, look()) == "199.jsonl holds another text than before"
    files[199].write_text("text")
    files[77].write_text("")
    assert fingerprints.difference(before, look()) == "200 files with 800 bytes → 200 files with 796 bytes"
    files[78].write_text("longtext")
    assert fingerprints.difference(before, look()) == "the names or sizes of its 200 files differ"
    assert fingerprints.difference(look(), look(files[:100])).startswith("200 files with 800 bytes → 100 files with")


def test_the_order_of_the_files_is_part_of_it(tmp_path):
    """A data position counts them."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    one, other = (
        fingerprints.of_files([str(tmp_path / name) for name in names], str(tmp_path)) for names in ("ab", "ba")
    )
    assert fingerprints.difference(one, other) == "the files have another order: b is where a was"
    assert fingerprints.difference(one, json.loads(json.dumps(one))) is None


def test_a_dataset_on_the_hub_is_known_by_its_name(here):
    hub = {"training.dataset": "c4", "training.dataset_path": None}
    save(here, hub)
    assert fingerprints.of_run(settings_in(here, hub))["data"] == {"remote": "allenai/c4"}
    assert resume(here, hub) == resume(here, hub | {"training.dataset_path": "allenai/c4"}) == []
    with pytest.raises(Refused, match=r"dataset_path \(someone/else\) is not as it was: allenai/c4 → someone/else"):
        resume(here, hub | {"training.dataset_path": "someone/else"})


def test_a_file_that_cannot_be_read_is_an_error_at_once(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read \(No such file or directory\)"):
        fingerprints.of_files([str(tmp_path / "gone.jsonl")], str(tmp_path))


# Mixtures


def mixture_in(here: Path, weight: float = 1, **first: str) -> dict[str, Any]:
    """Settings of a mixture of the run's data with itself."""
    tables = [{"dataset_path": str(here / "data"), "weight": 2} | first, {"dataset_path": str(here / "more")}]
    tables[1]["weight"] = weight
    return {"training.dataset": "mixture", "training.dataset_path": None, "training.mixture": tables}


def test_a_mixture_is_compared_by_its_settings_and_the_content_of_its_paths(here):
    shutil.copytree(here / "data", here / "more")
    save(here, mixture_in(here))
    assert resume(here, mixture_in(here)) == []
    with pytest.raises(
        Refused, match=r"^training\.mixture .*'weight': 1.* → .*'weight': 3.*allow_changed training\.mixt"
    ):
        resume(here, mixture_in(here, weight=3))
    with pytest.raises(Refused, match=r"^training\.mixture .*'text_column': 'b'"):
        resume(here, mixture_in(here, text_column="b"))
    with pytest.raises(Refused, match=r"^training\.dataset 'mixture' → 'c4_local'"):
        resume(here)
    assert resume(here, mixture_in(here, weight=3) | {ALLOW: ["training.mixture"]})
    (here / "data").rename(here / "moved")
    assert resume(here, mixture_in(here, dataset_path=str(here / "moved"))) == []
    (here / "more/b.jsonl").unlink()
    moved = mixture_in(here, dataset_path=str(here / "moved"))
    with pytest.raises(Refused, match=r"^training\.mixture is not as it was: dataset 1: b\.jsonl is not there any"):
        resume(here, moved)
    assert resume(here, moved | {ALLOW: ["training.mixture"]})


def test_what_was_not_held_out_is_none_or_0(here):
    save(here, {"training.held_out_share": 0.0})
    assert resume(here) == resume(here, {"training.held_out_share": 0.0}) == []
    save(here, without="held_out_share")
    assert resume(here, {"training.held_out_share": 0.0}) == []


def test_a_list_of_files_on_the_hub_is_known_by_their_names_in_any_revision():
    names = [f"hf://datasets/owner/name@{{}}/data/{number}.parquet" for number in range(3)]
    one, two = (fingerprints._of_remote("owner/name", [name.format(sha) for name in names]) for sha in ("a1", "b2"))
    assert one == two and fingerprints.difference(one, two) is None
    fewer = fingerprints._of_remote("owner/name", names[:2])
    assert fingerprints.difference(one, fewer) == "owner/name had 3 files, and has 2, or others"
