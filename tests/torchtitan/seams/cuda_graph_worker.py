"""The trainer with a stand-in for CUDA graphs, to test ``training.cuda_graph`` on a CPU. Run by ``test_train.py``.

    python cuda_graph_worker.py --job.config_file … --training.cuda_graph

Everything is as on a GPU, but that what is recorded runs once more, in Python, where a graph would run kernels. What a
graph would do otherwise is checked, or done: nothing is computed while it is recorded, results are written where the
recorded ones are, and parameters are read where they were and must be sharded, since none of FSDP's hooks would run.
"""

from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse.seams import cuda_graph
from torchtitan.experiments.lighthouse.seams.settings import main
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

cuda_graph.WARM_UP = 1


class StandIn:
    def __init__(self, model):
        self.model = model

    @staticmethod
    def why_not():
        return None

    def run(self, work):
        return work()

    def record(self, work):
        places = self.parameters()
        loss, gradients = work()
        locations = shards(loss, gradients)
        for location in locations:
            location.fill_(float("nan"))

        def run():
            assert self.parameters() == places
            for location, result in zip(locations, shards(*work()), strict=True):
                location.copy_(result)

        return (loss, gradients), run

    def parameters(self):
        parameters = list(self.model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters), "the parameters are not sharded"
        return [parameter.to_local().data_ptr() for parameter in parameters]


def shards(loss, gradients):
    return [loss, *(gradient.to_local() for gradient in gradients)]


class StandInTrainer(LighthouseTrainer):
    recorder = StandIn


if __name__ == "__main__":
    main(StandInTrainer)
