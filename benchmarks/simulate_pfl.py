"""One round of pfl's simulated backend, for simulate.py: torchrun starts a process for each core, as pfl's guide has it."""

from __future__ import annotations

import time

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from simulate_work import CLIP_NORM, LEARNING_RATE, STEPS, WARM_UP, Classifier, Work, arguments, tell
from torch import Tensor


class Network(Classifier):
    """With the metrics that pfl asks for, evaluated in the warm-up alone."""

    @torch.no_grad()
    def metrics(self, tokens: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """The loss."""
        return {"loss": Weighted.from_unweighted(float(self.loss(tokens, labels)))}


def backend_of(work: Work, clients: int, noise: float) -> SimulatedBackend:
    """All clients in turn, each clipped; noise once, on their sum."""
    data = {client: Dataset(work.of(client), user_id=str(client)) for client in range(clients)}
    federated = FederatedDataset(data.__getitem__, MinimizeReuseUserSampler(range(clients)))
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIP_NORM, noise))
    return SimulatedBackend(federated, federated, [mechanism])


def main() -> None:
    """A warm-up of few clients, then the round that counts."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    work, network = Work.load(options.work), Network(options.model)
    model = PyTorchModel(
        network,
        lambda _, lr: torch.optim.SGD(network.trained.values(), lr=lr),
        torch.optim.SGD(network.trained.values(), lr=1.0),
    )
    local = NNTrainHyperParams(
        local_batch_size=work.examples, local_num_epochs=STEPS, local_learning_rate=LEARNING_RATE, local_max_grad_norm=None
    )
    algorithm = FederatedAveraging()
    for number, count in enumerate((min(WARM_UP, options.clients), options.clients), start=1):
        network.load(work.adapter)
        backend = backend_of(work, count, options.noise)
        rounds = NNAlgorithmParams(
            central_num_iterations=number, evaluation_frequency=number, train_cohort_size=count, val_cohort_size=None
        )
        start = time.perf_counter()
        algorithm.run(rounds, backend, model, local, model_eval_params=local, send_metrics_to_platform=False)
        seconds = time.perf_counter() - start
    if distributed.global_rank == 0:
        tell(options, "pfl", seconds, {name: p.detach() - work.adapter[name] for name, p in network.trained.items()})


if __name__ == "__main__":
    main()
