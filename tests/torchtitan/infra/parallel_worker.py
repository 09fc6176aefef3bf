"""One rank of ``test_parallelize.py``: the parallelised debug model against the plain one, losses and gradients.

Runs on CPU, with a settings file and the layout as arguments: dp_replicate dp_shard tp [overrides …].
"""

import sys

from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator

use_cpu_without_accelerator()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.experiments.lighthouse import LighthouseTransformer, lighthouse_args, parallelize_lighthouse  # noqa: E402
from torchtitan.experiments.lighthouse.loss import model_takes_labels  # noqa: E402


def loss_of(model, tokens, labels, total, in_model=False):
    if in_model:
        return model(tokens, labels=labels) / total
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum") / total


def main() -> None:
    dp_replicate, dp_shard, tp = map(int, sys.argv[2:5])
    config = ConfigManager().parse_args(["--job.config_file", sys.argv[1], *sys.argv[5:]])
    torch.distributed.init_process_group("gloo")
    dims = ParallelDims(
        dp_replicate=dp_replicate, dp_shard=dp_shard, cp=1, tp=tp, pp=1, ep=1, etp=1,
        world_size=torch.distributed.get_world_size(),
    )  # fmt: skip
    args = lighthouse_args[config.model.flavor]
    args.update_from_config(config)

    torch.manual_seed(0)
    plain = LighthouseTransformer(args)
    with torch.no_grad():
        plain.init_weights()
        if config.training.sparse_loss_gradient:  # As if trained: what is no byte has no probability.
            plain.output.weight[:256] *= 30
            plain.output.weight[256:] = 0
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    model = parallelize_lighthouse(model, dims, config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))

    batch = dp_replicate * dp_shard
    rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    stream = torch.randint(0, 256, (batch, config.training.seq_len + 1))  # the seed is every rank's
    tokens, labels = stream[:, :-1], stream[:, 1:]
    expected = loss_of(plain, tokens, labels, labels.numel())
    expected.backward()
    own = slice(rank, rank + 1)
    loss = loss_of(model, tokens[own], labels[own], labels.numel(), in_model=model_takes_labels(dims))
    loss.backward()
    if config.training.sparse_loss_gradient:
        assert model.output.sparse.share() < 0.2

    total = loss.detach().clone()
    torch.distributed.all_reduce(total)  # tensor-parallel ranks hold the same loss
    torch.testing.assert_close(total / tp, expected.detach(), rtol=1e-6, atol=1e-6)
    routed = 0
    gradients = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        grad = gradients[name]
        assert isinstance(grad, DTensor), f"{name} was not parallelised"
        # Sums of the same float32 terms in another order.
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
        routed += "attention.wq" in name
    assert routed == args.n_layers
    torch.distributed.destroy_process_group()


main()
