"""A whole federation on one machine: broker, coordinator and sites are processes, and each site has its own part of the data."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import tomli_w

from dp_federated_lora.data import Table, resolve
from dp_federated_lora.errors import RunError
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench, participant_names
from dp_federated_lora.network.administration import ask
from dp_federated_lora.network.broker import Broker
from dp_federated_lora.network.coordinator import require_networked
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.offer import Offer, model_id
from dp_federated_lora.network.project import Project
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.runs import UNFINISHED
from dp_federated_lora.network.submissions import sign_submission
from dp_federated_lora.privacy import Trust

ADMINISTRATOR: Final = "operator"
DATA_SET: Final = "part"
RUN: Final = "demo"
_GLANCE: Final = 1.0
_MARGIN: Final = 1.0 - 1e-6  # a policy that is written in decimals lets the very plan pass

Report = Callable[[dict[str, Any]], None]


def up(config: Config, folder: Path, *, on_status: Report = lambda _: None) -> dict[str, Any]:
    """Provision, start everything, submit `config`, follow the run to its end and stop everything.

    Args:
        config: with privacy.trust = "distributed" or "local"; its training table is partitioned among sites.
        folder: new; everything is kept there. The run directory is in coordinator/runs/demo.
        on_status: called with the run's status whenever it has changed.

    Returns:
        The last status.

    Raises:
        RunError: if sites could not take part, the folder exists, a program ends early, or the run fails.
    """
    require_networked(config)
    if folder.exists():
        raise RunError(f"{folder} exists and is never overwritten: name another folder")
    folder.mkdir(parents=True, mode=0o700)
    names = participant_names(config)
    project = _project(names)
    kits = folder / "kits"
    provision(project, kits, with_keys=True)
    _prepare_sites(config, names, folder)
    with ExitStack() as stack:
        stack.enter_context(Broker(project, kits / "broker"))
        running = {
            name: stack.enter_context(_program(_words(name, folder), folder / f"{name}.log")) for name in ("coordinator", *names)
        }
        return asyncio.run(_follow(Kit.load(kits / ADMINISTRATOR), config, running, folder, on_status))


async def _follow(
    kit: Kit, config: Config, running: dict[str, subprocess.Popen[bytes]], folder: Path, on_status: Report
) -> dict[str, Any]:
    text = config.to_toml()
    signature = sign_submission(kit.signing, project=kit.project, run=RUN, config=text)
    await ask(kit, "submit", run=RUN, config=text, signature=signature)
    last: dict[str, Any] = {}
    while True:
        status = await ask(kit, "status", run=RUN)
        if status != last:
            on_status(status)
        last = status
        if status["state"] == "failed":
            raise RunError(f"the run failed: {status['reason']}")
        if status["state"] not in UNFINISHED:
            return last
        for name, process in running.items():
            if process.poll() is not None:
                raise RunError(f"{name} ended with exit code {process.returncode}; see {folder / name}.log")
        await asyncio.sleep(_GLANCE)


def _project(names: list[str]) -> Project:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Project.model_validate(
        {
            "name": "demo",
            "days": 1,
            "sites": names,
            "coordinators": ["coordinator"],
            "administrators": {ADMINISTRATOR: ["submit", "stop", "view"]},
            "servers": [{"host": "127.0.0.1", "port": port}],
        }
    )


def _prepare_sites(config: Config, names: list[str], folder: Path) -> None:
    """Each site's own data, and a policy that lets this run pass and nothing looser."""
    model = model_id(resolve(config.model.source, sha256=config.model.sha256))
    policy = tomli_w.dumps(_policy(config, Offer.of(config, model=model, submitter=ADMINISTRATOR, data_set=DATA_SET)))
    for name, table in zip(names, Workbench.of(config).tables(), strict=True):
        own = folder / name
        own.mkdir(mode=0o700)
        _write_table(own / "data.csv", table)
        (own / "policy.toml").write_text(policy, encoding="utf-8")


def _policy(config: Config, offer: Offer) -> dict[str, Any]:
    plan = privacy_plan(config)
    noises = [plan.mechanism.noise_multiplier] + ([plan.evaluation.noise_multiplier] if plan.evaluation else [])
    return {
        "data_set": [
            {"name": DATA_SET, "purposes": list(offer.purposes), "epsilon": 4.0 * plan.budget.epsilon, "delta": plan.budget.delta}
        ],
        "plan": {
            "max_epsilon": plan.budget.epsilon,
            "max_delta": plan.budget.delta,
            "min_noise_multiplier": min(noises) * _MARGIN,
            "min_participants": offer.participants,
            "min_opened": offer.opened,
            "units": [plan.unit.value],
            "trusts": [plan.trust.value],
            "methods": [offer.method],
            "models": [offer.model],
            "secure_aggregation": plan.trust is Trust.DISTRIBUTED,
            "allow_insecure_seed": offer.seeded,
        },
        "people": {"submit": [ADMINISTRATOR]},
    }


def _write_table(path: Path, table: Table) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows(zip(*table.columns.values(), strict=True))


def _words(name: str, folder: Path) -> list[str]:
    """The command of the coordinator or of a site."""
    own, kit = folder / name, str(folder / "kits" / name)
    if name == "coordinator":
        return ["coordinator", "--kit", kit, "--state", str(own)]
    words = ["site", "--kit", kit, "--data", str(own / "data.csv"), "--data-set", DATA_SET]
    return [*words, "--policy", str(own / "policy.toml"), "--state", str(own / "state"), "--threads", "1"]


@contextmanager
def _program(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `dpfl` command in a process of its own, asked to end afterwards."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # many processes share the cores
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  (this very program)
            [sys.executable, "-m", "dp_federated_lora.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
