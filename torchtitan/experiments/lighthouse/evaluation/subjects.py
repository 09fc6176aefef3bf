"""What ``evaluate`` looks at: a run's checkpoint, or a Hugging Face folder, with its tokenizer and its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor, nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager
from torchtitan.config.manager import custom_registry
from torchtitan.experiments.lighthouse import hugging_face
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal
from torchtitan.experiments.lighthouse.evaluation import positions
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.runs.settings import read_settings

#: On as many tokens it is seen whether a Hugging Face model's logits are those of its output layer alone.
PROBE = 32


@dataclass
class Subject:
    path: Path
    """The checkpoint, or the Hugging Face folder."""
    output: Path
    """Where the result goes, if nothing else is said."""
    attention: str
    settings: MergedConfig
    """Of the run; of a Hugging Face folder, the defaults with its context and its tokenizer"""
    tokenizer: HuggingFaceTokenizer
    load: Callable[[torch.device], positions.Scored]


def open_run(checkpoint: Path, output: Path, as_trained: bool, seq_len: int | None, words: Sequence[str]) -> Subject:
    """
    Args:
        checkpoint: sound.
        seq_len: in place of the run's context.
        words: settings that replace the run's, as on the trainer's command line.

    Raises:
        Refused: for settings that do not exist, or a tokenizer that is missing.
    """
    settings = overridden(read_settings(checkpoint), words)
    if seq_len is not None:
        settings.training = replace(settings.training, seq_len=seq_len)
    lighthouse = settings.lighthouse.enable and as_trained
    return Subject(
        checkpoint,
        output,
        "as trained, through Lighthouse" if lighthouse else "dense",
        settings,
        _tokenizer(settings),
        lambda device: positions.load(checkpoint, settings, dense=not as_trained, device=device),
    )


def open_hugging_face(folder: Path, seq_len: int | None, words: Sequence[str]) -> Subject:
    """
    Args:
        seq_len: in place of ``max_position_embeddings``.
        words: settings, as on the trainer's command line, a file of them too: they say how the data is read.

    Raises:
        Refused: for a folder without a tokenizer, or settings that do not exist.
    """
    length = seq_len or hugging_face.context_of(folder)
    if length is None:
        raise Refused(f"{folder}: its config has no max_position_embeddings; say how long sequences are with --seq-len")
    custom = ["--job.custom_config_module", "torchtitan.experiments.lighthouse.job_config"]
    with _said(words), as_refusal():
        settings = cast(MergedConfig, ConfigManager().parse_args([*custom, *words]))
    # A file's model and context are not this folder's. Those that the command line itself says are meant.
    settings.model = replace(settings.model, hf_assets_path=str(folder))
    settings.training = replace(settings.training, seq_len=length)
    settings = overridden(settings, words)
    return Subject(
        folder, folder / "evaluate", "dense", settings, _tokenizer(settings), lambda device: HuggingFace(folder, device)
    )


def overridden(settings: MergedConfig, words: Sequence[str]) -> MergedConfig:
    """The same settings, with those that ``words`` give as on the trainer's command line.

    Raises:
        Refused: for words that are no settings.
    """
    with _said(words):
        return tyro.cli(type(settings), args=list(words), default=settings, registry=custom_registry)


@contextmanager
def _said(words: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except SystemExit as stop:  # tyro has said why
        raise Refused(f"{' '.join(words)}: no settings of the trainer") from stop
    except OSError as error:
        raise Refused(f"--job.config_file: cannot be read ({error})") from error


class HuggingFace(nn.Module):
    """A causal language model of transformers, dense, in float32, as ``positions.Scored``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """
        Raises:
            Refused: if its logits are more than its output layer makes of the last hidden state.
        """
        super().__init__()
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        model = model.to(device).eval()
        self.body: nn.Module = model.base_model
        self.norm: nn.Module = nn.Identity()
        self.output: nn.Module = model.get_output_embeddings()
        tokens = torch.arange(PROBE, device=device)[None] % cast(Tensor, self.output.weight).shape[0]
        with torch.inference_mode():
            whole, parts = model(tokens, use_cache=False).logits, self.output(self.hidden_states(tokens))
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * whole.abs().max().item()):
            raise Refused(
                f"{folder}: {type(model).__name__} scales or caps its logits after the output layer, which "
                "evaluate would not see"
            )

    def hidden_states(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(tokens, use_cache=False).last_hidden_state
        return hidden


def _tokenizer(settings: MergedConfig) -> HuggingFaceTokenizer:
    try:
        return build_tokenizer(settings)
    except FileNotFoundError as error:
        raise Refused(f"{error}; another: -- --model.hf_assets_path FOLDER") from error
