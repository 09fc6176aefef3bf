"""Lighthouse as a torchtitan model: its flavors and its train spec, registered under the name ``lighthouse`` on import.

Loaded by ``experimental.custom_import = "torchtitan.experiments.lighthouse.train_spec"``.
"""

from typing import NoReturn

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.experiments.lighthouse.data.sources import register_datasets
from torchtitan.experiments.lighthouse.data.text_datasets import build_dataloader
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.infra.parallelize import parallelize_lighthouse
from torchtitan.experiments.lighthouse.loss import build_loss
from torchtitan.experiments.lighthouse.metrics import build_metrics_processor
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM, FLAVORS
from torchtitan.experiments.lighthouse.validate import build_validator
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec


class _Flavors(dict[str, LighthouseModelArgs]):
    def __missing__(self, name: str) -> NoReturn:
        raise ValueError(f"model.flavor={name!r}: must be one of {', '.join(map(repr, self))}")


#: ``update_from_config`` gives the last one its sizes.
lighthouse_args = _Flavors({name: LighthouseModelArgs.of(sizes) for name, sizes in FLAVORS.items()})
lighthouse_args[CUSTOM] = LighthouseModelArgs()


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
