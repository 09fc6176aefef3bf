"""The ``[lighthouse]`` and ``[llama]`` sections, and safer defaults for two of upstream's settings.

Loaded through ``job.custom_config_module``; torchtitan merges these dataclasses into its own, field by field.
"""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from torchtitan.config import job_config as upstream
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM, Llama
from tyro.constructors import PrimitiveConstructorSpec

from lighthouse import LighthouseConfig
from lighthouse.inner_attention import AttentionName, check_name

#: A list of tables in a TOML file, on the command line.
JSON = PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: json.loads(words[0]),
    is_instance=lambda value: isinstance(value, list),
    str_from_instance=lambda value: [json.dumps(value)],
)


@dataclass(frozen=True, kw_only=True)
class Lighthouse(LighthouseConfig):
    """The library's settings, which it declares and documents, and where the model uses them."""

    enable: bool = False
    """Whether the layers below run Lighthouse Attention; off, every layer is upstream's dense one"""

    layers: str = "2-27"
    """
    The layers that run Lighthouse: comma-separated layers and inclusive ranges; negative numbers count from the end.
    "2-27" and "2--3" are the same in a 30-layer model. All others stay dense.
    """

    rope: Literal["before_pool", "after_gather"] = "before_pool"
    """
    Where Lighthouse layers apply the rotary embedding: to every query and key, as published, or to the pooled rows of
    the selected entries, each at its last position (scorer "norm" only). Dense layers do not differ.
    """

    dense_every: int = 0
    """
    Every so many steps of the run, one runs dense attention in all layers; 0, as published: none does. Steps are
    numbered as in the log, from the start of the chain of stages. Without effect where ``enable`` is off.
    """

    inner_attention: AttentionName = "auto"
    """
    The kernels of attention, in dense layers and steps and over the rows that Lighthouse selects. "auto": cuDNN's, or
    those of torch that can run where cuDNN's cannot. "cudnn" and "flash" are torch's, "flash3" and "flash4" packages of
    their own; these four are never replaced by others. Also where ``enable`` is off
    """

    stage1_checkpoint: str = ""
    """
    The checkpoint of the stage before, which this run continues; written by scripts/resume_dense.py, not by hand
    """

    stage: int = 0
    """Which stage of its chain this run is, 0 where nothing says so; written by scripts/resume_dense.py, not by hand"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.inner_attention, "inner_attention")
        every = self.dense_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 0 or every == 1:
            raise ValueError(
                f"dense_every={every!r}: must be 0 (no step is dense) or an integer of at least 2 (every step dense is "
                "enable=false); nearest valid values: 0 or 2"
            )

    def is_dense_step(self, step: int) -> bool:
        """Whether ``dense_every`` makes this step of a run through Lighthouse a dense one."""
        return self.enable and self.dense_every > 0 and step % self.dense_every == 0

    def attention_config(self) -> LighthouseConfig:
        """The library's part."""
        return LighthouseConfig(**{field.name: getattr(self, field.name) for field in fields(LighthouseConfig)})


def check_degrees(parallelism: upstream.Parallelism, world_size: int) -> None:
    """Refuse degrees that do not fill the processes there are. (Upstream's assertion says neither.)

    Raises:
        ValueError: naming the degrees, and the nearest degree or number of processes.
    """
    kinds = [
        "data_parallel_replicate",
        "data_parallel_shard",
        "context_parallel",
        "tensor_parallel",
        "pipeline_parallel",
    ]
    degrees = {f"{kind}_degree": getattr(parallelism, f"{kind}_degree") for kind in kinds}
    takes_the_rest = degrees["data_parallel_shard_degree"] == -1
    if takes_the_rest:
        del degrees["data_parallel_shard_degree"]
    for name, degree in degrees.items():
        if degree < 1:
            raise ValueError(f"parallelism.{name}={degree}: must be at least 1; nearest valid value: 1")
    needed = math.prod(degrees.values())
    nearest = {max(1, world_size // needed) * needed, -(-world_size // needed) * needed} if takes_the_rest else {needed}
    if world_size not in nearest:
        product = " · ".join(f"{name}={degree}" for name, degree in degrees.items())
        raise ValueError(
            f"WORLD_SIZE={world_size}: must be {'a multiple of ' if takes_the_rest else ''}{needed} ({product}); "
            f"nearest valid values: {' or '.join(map(str, sorted(nearest)))}"
        )


def without_none(config: Any) -> Any:
    """Settings as TOML can hold them: it has no None."""
    if isinstance(config, dict):
        return {name: without_none(value) for name, value in config.items() if value is not None}
    return config


@dataclass
class Job(upstream.Job):
    save_config_file: str | None = "config.json"
    """Where the merged settings are kept in the dump folder; scripts/resume_dense.py reads them from there"""


@dataclass
class Experimental(upstream.Experimental):
    custom_import: str = "torchtitan.experiments.lighthouse.train_spec"
    """The module that registers the model; upstream's own entry point imports it"""


@dataclass
class Model(upstream.Model):
    name: str = "lighthouse"
    """Which model to train"""

    flavor: str = CUSTOM
    """Its sizes: a name, or "custom", for those of hf_config and of the [llama] section alone"""

    hf_config: str = ""
    """
    A Llama's config.json in the form of Hugging Face, or the folder that holds one: its sizes, for flavor "custom". The
    [llama] section may change them. The run keeps them in its own config.json, and the file is not read again
    """

    hf_assets_path: str = BYTE_TOKENIZER_PATH
    """Folder of the tokenizer; by default the byte-level one that ships with Lighthouse"""


@dataclass
class ActivationCheckpoint(upstream.ActivationCheckpoint):
    offload_layers: int = 0
    """
    So many layers, from the first on, keep their input in host memory instead of the GPU's until their backward (modes
    "full" and "selective"); 0: none. Each takes tokens x dim x 2 bytes there. Losses and gradients are the same
    """


@dataclass
class Metrics(upstream.Metrics):
    sample_freq: int = 0
    """
    Every so many steps the model continues a prompt, each time with the likeliest token, with dense attention in all
    layers; the text goes to the console and to metrics.jsonl. 0: never. Not with context, tensor or pipeline
    parallelism
    """

    sample_prompt: str = "The "
    """What it continues, at the beginning of a document"""


@dataclass
class Checkpoint(upstream.Checkpoint):
    last_save_model_only: bool = False
    """Stage 2 needs the last checkpoint whole; upstream's default would drop the optimizer from it"""

    keep_latest_k: int = 0
    """
    How many of the newest sound checkpoints to keep, at least 2; 0 keeps all. Damaged and unfinished ones do not count,
    and the last one of a stage is never deleted.
    """

    interval_minutes: float = 0
    """Save also when so many minutes have passed since the last save; 0: by steps alone (interval)"""

    verify: Literal["digest", "size", "off"] = "digest"
    """
    What is compared with a checkpoint's manifest before it is loaded: the content of every file, which is read once
    more for it, each process a share; the sizes alone; or nothing. Instead of damaged checkpoints, the newest sound one
    is taken.
    """

    allow_changed: list[str] = field(default_factory=list)
    """
    Settings that may differ from those that the checkpoint was trained with, although that makes it another run, for
    example lighthouse.top_k; training.dataset_path and model.hf_assets_path stand for the files there. The table is in
    docs/reliability.md
    """


@dataclass
class Training(upstream.Training):
    dataset_split: str = ""
    """
    Of the datasets "local" and "hub". On the Hub it is "train" by default. Of a folder it is the files with this word
    in their path, by default all
    """

    dataset_config: str = ""
    """Which configuration of a dataset on the Hub; by default its only one"""

    text_column: str = "text"
    """Where a record of the datasets "local" and "hub" has its text"""

    mixture: Annotated[list[dict[str, Any]], JSON] = field(default_factory=list)
    """
    Several datasets, for dataset = "mixture": a table each, with weight (its share of the text, in bytes), dataset
    ("local" by default), dataset_path, dataset_split, dataset_config and text_column. On the command line as JSON
    """

    shuffle_buffer: int = 0
    """
    Shuffle among so many documents of a dataset, which every process that reads keeps in memory, and shuffle the files;
    0: read them in their order
    """

    data_seed: int = 0
    """Of shuffle_buffer and mixture"""

    held_out_share: float | None = None
    """
    Share of the documents that is never trained on, chosen by a hash of the text; by default 0.01 where validation is
    enabled and has no dataset of its own, and 0 otherwise
    """

    min_document_chars: int = 0
    """Drop documents of fewer characters. They are counted and logged"""

    cuda_graph: bool = False
    """
    Run forward and backward of a step as one CUDA graph, on one GPU: for small models, whose steps are bound by the
    host. Losses and weights stay the same, to the bit. Its memory is not free for anything else, validation for example
    """

    sparse_loss_gradient: bool = False
    """
    Leave out of the loss's gradient the columns of the vocabulary that are negligible: their probabilities add up to no
    more than the rounding of one. For vocabularies of which the data uses a small part
    """

    max_bad_records: int = 0
    """
    How many records without a usable text may be skipped in one pass over the files. They are logged. One more ends the
    run.
    """


@dataclass
class Validation(upstream.Validation):
    dataset: str = "held_out"
    """
    What is scored: a dataset, or by default the documents that training.held_out_share keeps out of training; where C4
    ("c4") or "stdlib" is trained on, their own split for validation
    """

    dataset_split: str = ""
    """As that of [training]"""

    dataset_config: str = ""
    """As that of [training]"""

    text_column: str = "text"
    """As that of [training]"""

    steps: int = 32
    """How many batches of each data-parallel rank are scored; -1: all, until one of the ranks has no more"""

    max_bad_records: int = 0
    """As that of [training], in one pass of one data-parallel rank and data worker"""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    experimental: Experimental = field(default_factory=Experimental)
    model: Model = field(default_factory=Model)
    llama: Llama = field(default_factory=Llama)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)


class MergedConfig(upstream.JobConfig):
    """What torchtitan makes of its ``JobConfig`` and this one, for annotations: the real class is made at run time."""

    model: Model
    llama: Llama
    metrics: Metrics
    checkpoint: Checkpoint
    activation_checkpoint: ActivationCheckpoint
    training: Training
    validation: Validation
    lighthouse: Lighthouse
