"""Checkpoints as Hugging Face folders, and back; ``export_hf`` is the command."""

from __future__ import annotations

import copy
import json
import logging
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

import torch
from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.model.hf_config import read_hf_config
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM
from torchtitan.experiments.lighthouse.runs import manifest
from torchtitan.experiments.lighthouse.runs.checkpoints import Verify, dump_folder_of, find_checkpoint
from torchtitan.experiments.lighthouse.runs.settings import build_model, load_model, one_process, read_settings
from torchtitan.experiments.lighthouse.train_spec import lighthouse_args
from torchtitan.models.llama3.model.model import FeedForward
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from transformers import LlamaConfig

#: What a tokenizer may consist of. A folder of assets may hold weights too, which are not this model's.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)

#: What makes a Llama's numbers, the rotary embedding aside (``rope_parameters``).
ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
)


class _Tokens(TypedDict, total=False):
    bos_token_id: int | None
    eos_token_id: int | None


def export(
    path: Path,
    output: Path | None,
    dtype: torch.dtype,
    tokenizer: Path | None,
    overwrite: bool,
    verify: Verify = "digest",
) -> None:
    """Write the checkpoint at ``path`` as a folder for ``transformers``.

    Args:
        path: a run's dump folder or one of its checkpoints.
        output: the folder to write; None is hf-step-N in the dump folder.
        tokenizer: a folder that replaces the run's model.hf_assets_path.

    Raises:
        Refused: if there is no sound checkpoint or tokenizer, or ``output`` is taken.
    """
    from transformers import LlamaForCausalLM

    checkpoint = find_checkpoint(path, verify)
    output = output or dump_folder_of(checkpoint) / f"hf-{checkpoint.name}"
    settings = read_settings(checkpoint)
    if tokenizer is not None:
        settings.model.hf_assets_path = str(tokenizer)
    assets = Path(settings.model.hf_assets_path)
    if not assets.is_dir():
        raise Refused(f"{assets}, the run's model.hf_assets_path, is not here; name its tokenizer with --tokenizer")
    trained_with = build_tokenizer(settings)

    with written_whole(output, "model*.safetensors", checkpoint, overwrite) as folder, _rotary_settings_as_they_are():
        model = load_model(checkpoint, settings, dense=True, device="cpu")
        config = hf_config(model, bos_token_id=trained_with.bos_id, eos_token_id=trained_with.eos_id)
        weights = Llama3StateDictAdapter(model.model_args, None).to_hf(model.state_dict())
        with torch.device("meta"):
            exported = LlamaForCausalLM(config)
        exported.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        exported.save_pretrained(folder)
        _add_older_rotary_settings(folder / "config.json")
        copy_tokenizer(assets, trained_with, folder)
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"{checkpoint} -> {output}: LlamaForCausalLM, {parameters:,} parameters, {dtype}, {_size(output):,} bytes")
    if settings.lighthouse.enable:
        command = shlex.join(["python", "scripts/resume_dense.py", str(path)])
        print(
            f"WARNING: {checkpoint} is Stage 1's: it was trained through Lighthouse (lighthouse.enable is true), not "
            f"for dense attention, which is what transformers runs. Judge the model after Stage 2: {command}",
            file=sys.stderr,
        )


def import_folder(hf_folder: Path, flavor: str, output: Path, *, overwrite: bool = False) -> None:
    """Write a model-only checkpoint, float32, with the weights of ``hf_folder``.

    Raises:
        Refused: naming each difference between the folder's model and the flavor, or if ``output`` is taken.
    """
    if flavor not in lighthouse_args:
        raise Refused(f"--flavor {flavor}: must be one of {', '.join(lighthouse_args)}")
    args = copy.deepcopy(lighthouse_args[flavor])
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    adapter = Llama3StateDictAdapter(args, None)
    with _rotary_settings_as_they_are():
        check_same_model(hf_folder, model, flavor)

    with written_whole(output, ".metadata", hf_folder, overwrite) as folder, one_process():
        weights = adapter.to_hf({name: torch.empty_like(w, device="cpu") for name, w in model.state_dict().items()})
        state_dict_loader.load(weights, storage_reader=adapter.get_hf_storage_reader(str(hf_folder)), no_dist=True)
        state_dict_saver.save(adapter.from_hf(weights), checkpoint_id=folder, no_dist=True)
        manifest.write(folder, manifest.record_files(folder), {}, step=0, last_of_stage=False)
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"{hf_folder} -> {output}: {flavor}, {parameters:,} parameters, float32, {_size(output):,} bytes")
    flags = ["--checkpoint.initial_load_path", str(output.resolve())]
    if (hf_folder / "tokenizer.json").is_file():
        flags += ["--model.hf_assets_path", str(hf_folder.resolve())]
    print(
        f"A run of flavor {flavor} without checkpoints of its own starts from it, with its tokenizer, given\n    ",
        end="",
    )
    print(shlex.join(flags))


def hf_config(model: LighthouseTransformer, **tokens: Unpack[_Tokens]) -> LlamaConfig:
    """The configuration of ``model``, on any device, for ``LlamaForCausalLM``; ``tokens`` as in ``LlamaConfig``."""
    from transformers import LlamaConfig

    args, scaling = model.model_args, model.model_args.rope_scaling_args
    feed_forward = cast(FeedForward, model.layers["0"].feed_forward)
    return LlamaConfig(
        hidden_size=args.dim,
        # Upstream derives it from dim, ffn_dim_multiplier and multiple_of; the layer knows what came of it.
        intermediate_size=feed_forward.w1.out_features,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads or args.n_heads,
        head_dim=args.dim // args.n_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": float(args.rope_theta),
            "factor": float(scaling.scaling_factor),
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        **tokens,
    )


def context_of(hf_folder: Path) -> int | None:
    """The tokens in the longest sequence of the folder's model, as its config says; None where it does not.

    Raises:
        Refused: if transformers is missing.
    """
    require_transformers()
    from transformers import AutoConfig

    # A model of text and more has a configuration for each.
    config = AutoConfig.from_pretrained(hf_folder, local_files_only=True).get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def check_same_model(hf_folder: Path, model: LighthouseTransformer, flavor: str) -> None:
    """Whether the folder's settings and tensors are those of ``model``.

    Raises:
        Refused: naming each difference.
    """
    from transformers import LlamaConfig

    config_file = hf_folder / "config.json"
    if not config_file.is_file() or not any(hf_folder.glob("*.safetensors")):
        raise Refused(f"{hf_folder} is no Hugging Face model: it needs config.json and *.safetensors")
    model_type = json.loads(config_file.read_text()).get("model_type")
    if model_type != "llama":
        raise Refused(f"{config_file}: model_type is {model_type!r}; must be 'llama'")

    found, expected = LlamaConfig.from_pretrained(hf_folder), hf_config(model)
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in ARCHITECTURE}
    # Whatever a configuration says or leaves out, transformers fills in its rope_parameters.
    there, ours = (cast("dict[str, Any]", config.rope_parameters) for config in (found, expected))
    for name in sorted((there.keys() | ours.keys()) - {"type"}):
        pairs[name] = there.get(name), ours.get(name)
    _refuse_differences(pairs, hf_folder, flavor)
    _refuse_differences(_tensors(hf_folder, model), hf_folder, flavor)


def check_start(settings: MergedConfig) -> list[str]:
    """Whether the weights of a Hugging Face folder, with which a run is to start, are those of its model.

    Args:
        settings: complete.

    Returns:
        Lines that say what the run computes in another way, on purpose: what [llama] changes in the folder's model.

    Raises:
        Refused: naming what differs.
    """
    checkpoint, ours = settings.checkpoint, settings.llama
    name = "checkpoint.initial_load_path" if checkpoint.initial_load_path else "model.hf_assets_path"
    folder = Path(checkpoint.initial_load_path or settings.model.hf_assets_path)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise Refused(f"{name}={str(folder)!r}: is no Hugging Face model: it needs config.json and *.safetensors")
    theirs = read_hf_config(folder)
    differ = [field for field in vars(ours) if getattr(ours, field) != getattr(theirs, field)]
    if ours.rope_factor == theirs.rope_factor == 1:  # the others decide nothing
        differ = [field for field in differ if not field.startswith("rope_") or field == "rope_theta"]
    changed = [f"llama.{field} {getattr(theirs, field)} → {getattr(ours, field)}" for field in differ]
    its_own = settings.model.hf_config and _config_file(settings.model.hf_config) == _config_file(folder)
    of_weights = [field for field in differ if not field.startswith("rope_") and field != "norm_eps"]
    if of_weights or (differ and not its_own):
        raise Refused(
            f"{name}={str(folder)!r}: its weights are of another model: {'; '.join(changed)}; nearest valid value: "
            f"model.flavor={CUSTOM!r} with model.hf_config={str(folder)!r}, which [llama] may change in norm_eps and "
            "rope_…"
        )
    wrong = [
        f"{tensor} {found} there, {needed} needed"
        for tensor, (found, needed) in _tensors(folder, build_model(settings)).items()
        if found != needed
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Refused(f"{name}={str(folder)!r}: its tensors are not those of its config: {'; '.join(wrong[:3])}{more}")
    return [f"Not as in {folder}: {change}" for change in changed]


def _config_file(path: str | Path) -> Path:
    path = Path(path).resolve()
    return path / "config.json" if path.is_dir() else path


def _tensors(hf_folder: Path, model: LighthouseTransformer) -> dict[str, tuple[Any, Any]]:
    """The shape of every tensor in the folder and of those that ``model`` needs; None for one that is not there."""
    adapter = Llama3StateDictAdapter(model.model_args, None)
    metadata = adapter.get_hf_storage_reader(str(hf_folder)).read_metadata()
    saved = cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)  # safetensors hold nothing else
    # Older Llama checkpoints hold the rotary frequencies too; the settings above say the same.
    shapes = {name: tuple(entry.size) for name, entry in saved.items() if not name.endswith("rotary_emb.inv_freq")}
    needed = {name: tuple(weight.shape) for name, weight in adapter.to_hf(model.state_dict()).items()}
    names = sorted(shapes.keys() | needed.keys())
    return {name: (shapes.get(name), needed.get(name)) for name in names}


def copy_tokenizer(assets: Path, trained_with: HuggingFaceTokenizer, folder: Path) -> None:
    """Copy the tokenizer in ``assets``, and see that ``AutoTokenizer`` gives the ids that the model was trained on.

    ``transformers`` leaves add_bos_token in tokenizer_config.json to the tokenizer's class, and the general class does
    nothing with it; the trainer obeys it. Where that makes a difference, tokenizer.json is told to begin with BOS.
    """
    from transformers import AutoTokenizer

    for name in TOKENIZER_FILES:
        if (assets / name).is_file():
            shutil.copyfile(assets / name, folder / name)
    probe = "Hello, wörld!\n  12"
    expected, found = trained_with.encode(probe), AutoTokenizer.from_pretrained(folder).encode(probe)
    file = folder / "tokenizer.json"
    if file.is_file() and expected == [trained_with.bos_id, *found]:
        # Upstream's annotations know only the None that both start as.
        _begin_with(trained_with.bos_token, trained_with.bos_id, file)  # type: ignore[arg-type]
        found = AutoTokenizer.from_pretrained(folder).encode(probe)
    if found != expected:
        print(
            f"WARNING: AutoTokenizer makes {found} of {probe!r}, and the trainer's tokenizer {expected}",
            file=sys.stderr,
        )


@contextmanager
def written_whole(folder: Path, mark: str, source: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to that becomes ``folder`` if all goes well; otherwise nothing is left of it.

    Args:
        mark: pattern of a file that a folder written here holds, so that nothing else is ever overwritten.
        source: what is being read; may not lie in ``folder``.

    Raises:
        Refused: if ``folder`` is taken.
    """
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--output {folder} is a file")
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not overwrite:
        raise Refused(f"--output {folder} is not empty; --overwrite replaces it, or choose another")
    if taken and (source.resolve().is_relative_to(folder.resolve()) or not any(folder.glob(mark))):
        raise Refused(
            f"--output {folder} is not a folder that this command wrote ({mark}); --overwrite leaves it alone"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        unfinished = Path(scratch) / "new"
        unfinished.mkdir()
        yield unfinished
        if taken:
            folder.rename(Path(scratch) / "old")
        unfinished.rename(folder)


def _refuse_differences(pairs: dict[str, tuple[Any, Any]], hf_folder: Path, flavor: str) -> None:
    lines = [f"  {name}: {found} there, {ours} in {flavor}" for name, (found, ours) in pairs.items() if found != ours]
    if len(lines) > 20:
        lines[20:] = [f"  and {len(lines) - 20} more"]
    if lines:
        raise Refused("\n".join([f"{hf_folder} is not the model of flavor {flavor}:", *lines]))


def _add_older_rotary_settings(config_file: Path) -> None:
    """The rotary settings under the names that they had before transformers 5.

    An older version, or another program, would overlook rope_parameters and compute other positions without a word.
    """
    config = json.loads(config_file.read_text())
    scaling = dict(config["rope_parameters"])
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _rotary_settings_as_they_are() -> Iterator[None]:
    """Without transformers' warning that Llama 3's scaling is for contexts beyond 8,192 tokens; and without its bar.

    The rotary settings are those that the model was trained with, and shorter contexts are allowed.
    """
    from transformers.utils import logging as transformers_logging

    def is_wanted(record: logging.LogRecord) -> bool:
        return "original_max_position_embeddings" not in record.getMessage()

    logger, bar = logging.getLogger("transformers.modeling_rope_utils"), transformers_logging.is_progress_bar_enabled()
    logger.addFilter(is_wanted)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
        if bar:
            transformers_logging.enable_progress_bar()


def _begin_with(token: str, token_id: int, tokenizer_file: Path) -> None:
    """Let the tokenizer in ``tokenizer_file`` begin every text with ``token``, after whatever else it does."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    begin = TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, token_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = begin if before is None else Sequence([before, begin])
    tokenizer.save(str(tokenizer_file))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def require_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise Refused("needs transformers: pip install 'lighthouse-attention[hf]'") from error
    if int(transformers.__version__.split(".")[0]) < 5:  # would take rope_parameters for nothing, in silence
        raise Refused(f"needs transformers 5, found {transformers.__version__}: pip install 'lighthouse-attention[hf]'")
