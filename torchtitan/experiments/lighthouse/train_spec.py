"""Lighthouse as a torchtitan model: its flavors and its train spec, registered under the name ``lighthouse`` on import.

Loaded by ``experimental.custom_import = "torchtitan.experiments.lighthouse.train_spec"``.
"""

from typing import NoReturn, NotRequired, TypedDict

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.experiments.lighthouse.data.text_datasets import build_dataloader, register_datasets
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.infra.parallelize import parallelize_lighthouse
from torchtitan.experiments.lighthouse.loss import build_loss
from torchtitan.experiments.lighthouse.metrics import build_metrics_processor
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.validate import build_validator
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

#: The byte tokenizer's 258 tokens, rounded up for the matrix units and for tensor parallelism.
BYTE_VOCAB_SIZE = 320


class _Body(TypedDict):
    dim: int
    n_layers: int
    n_heads: int
    multiple_of: int
    ffn_dim_multiplier: NotRequired[float]


# An FFN width of 1536 is 9/16 of the 8/3·dim that Llama starts from.
_BODY_530M: _Body = {"dim": 1024, "n_layers": 30, "n_heads": 8, "ffn_dim_multiplier": 9 / 16, "multiple_of": 256}
_BODY_32M: _Body = {"dim": 512, "n_layers": 10, "n_heads": 4, "multiple_of": 128}
_BODY_DEBUG: _Body = {"dim": 128, "n_layers": 6, "n_heads": 4, "multiple_of": 64}


class _Flavors(dict[str, LighthouseModelArgs]):
    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"model.flavor={name!r}: must be one of {', '.join(map(repr, self))}")


lighthouse_args = _Flavors(
    {
        "530m": LighthouseModelArgs(**_BODY_530M, vocab_size=128256),
        "268m": LighthouseModelArgs(**_BODY_530M, vocab_size=BYTE_VOCAB_SIZE),
        "32m": LighthouseModelArgs(**_BODY_32M, vocab_size=BYTE_VOCAB_SIZE),
        "debug": LighthouseModelArgs(**_BODY_DEBUG, vocab_size=BYTE_VOCAB_SIZE),
        "debug_gqa": LighthouseModelArgs(**_BODY_DEBUG, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE),
    }
)


def get_train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=LighthouseTransformer,
        model_args=lighthouse_args,
        parallelize_fn=parallelize_lighthouse,
        pipelining_fn=pipeline_llm,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=Llama3StateDictAdapter,
    )


register_train_spec("lighthouse", get_train_spec())
register_datasets()
