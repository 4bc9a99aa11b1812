"""One round of Flower's simulation runtime, for simulate.py: a Ray actor for each core, the model loaded once in each."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from simulate_work import CLIP_NORM, WARM_UP, Work, arguments, loaded, tell

logging.getLogger("flwr").setLevel(logging.ERROR)
client_app = ClientApp(mods=[fixedclipping_mod])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of one client from the adapter that was sent."""
    torch.set_num_threads(1)
    config = message.content["config"]
    work, model = loaded(Path(config["work"]), Path(config["model"]))
    start = message.content["arrays"].to_torch_state_dict()
    model.load(start)
    model.learn(*work.of(int(context.node_config["partition-id"])))
    arrays = ArrayRecord({name: model.trained[name].detach() for name in start})
    content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": work.examples})}
    return Message(content=RecordDict(content), reply_to=message)


def main() -> None:
    """A warm-up of few clients, then the round that counts."""
    options = arguments(__doc__)
    adapter = Work.load(options.work).adapter
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        for count in (min(WARM_UP, options.clients), options.clients):
            strategy = DifferentialPrivacyClientSideFixedClipping(
                FedAvg(fraction_train=1e-9, min_train_nodes=count, min_available_nodes=count, fraction_evaluate=0.0),
                options.noise,
                CLIP_NORM,
                count,
            )
            config = ConfigRecord({"work": str(options.work), "model": str(options.model)})
            start = time.perf_counter()
            result = strategy.start(grid, ArrayRecord(adapter), num_rounds=1, train_config=config)
            seconds = time.perf_counter() - start
        after = result.arrays.to_torch_state_dict()
        tell(options, "flwr", seconds, {name: after[name] - value for name, value in adapter.items()})

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": options.cores}}
    run_simulation(server_app, client_app, options.clients, backend_config=resources)


if __name__ == "__main__":
    from simulate_flower import main as by_name  # so that actors find the client by its module's name

    by_name()
