"""All programs of a federation as processes, for tests and measurements that kill them or cut them off."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w

from dp_federated_lora.errors import RunError
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.ledgers import ledgers_at
from dp_federated_lora.network import local
from dp_federated_lora.network.administration import ask
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.project import Project
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.runs import UNFINISHED
from dp_federated_lora.network.submissions import sign_submission
from kits import free_ports

SITES = [f"client-{number}" for number in range(5)]
BROKERS = ["broker", "broker-1", "broker-2"]
COORDINATORS = ["coordinator", "spare"]


class Programs:
    """Brokers, coordinators and five sites, by name.

    `within` has what goes before a program's command. Of several `brokers`, which form a cluster, and two `coordinators`, the
    second of which stands by, any one may be killed for good.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        stack: ExitStack,
        *,
        host: str = "127.0.0.1",
        within: Mapping[str, Sequence[str]] | None = None,
        brokers: int = 1,
        coordinators: int = 1,
    ) -> None:
        folder.mkdir()
        self.folder, self.stack, self.config, self.within = folder, stack, config, within or {}
        self.brokers, self.coordinators = BROKERS[:brokers], COORDINATORS[:coordinators]
        project = local._project(SITES).model_dump()
        ports = free_ports(2 * brokers)
        project["servers"] = [{"host": host, "port": port} for port in ports[:brokers]]
        project["coordinators"] = self.coordinators
        self.routes = ports[brokers:] if brokers > 1 else []
        self.kits = folder / "kits"
        provision(Project.model_validate(project), self.kits, with_keys=True)
        local._prepare_sites(config, SITES, folder)
        (folder / "project.toml").write_text(tomli_w.dumps(project))
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(self.end)
        for name in (*self.brokers, *self.coordinators, *SITES):
            self.start(name)

    def words(self, name: str) -> list[str]:
        """The command of a program."""
        if name in self.brokers:
            words = ["broker", str(self.folder / "project.toml"), str(self.kits), "--server", str(self.brokers.index(name))]
            return words + [word for port in self.routes for word in ("--route-ports", str(port))]
        if name in self.coordinators:
            words = ["coordinator", "--kit", str(self.kits / name), "--state", str(self.folder / "coordinator")]
            return words if name == "coordinator" else [*words, "--standby"]
        return local._words(name, self.folder)

    def start(self, name: str) -> None:
        words = self.words(name)
        command = [*self.within.get(name, ()), sys.executable, "-m", "dp_federated_lora.cli.main", *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        if name in self.brokers:  # its child is the broker itself
            found = subprocess.run(["pgrep", "-P", str(self.running[name].pid)], capture_output=True, text=True, check=False)
            for child in found.stdout.split():
                os.kill(int(child), signal.SIGKILL)
        self.running[name].kill()
        self.running[name].wait()

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()

    @property
    def administrator(self) -> Kit:
        return Kit.load(self.kits / local.ADMINISTRATOR)

    def submit(self) -> None:
        kit, text = self.administrator, self.config.to_toml()
        signature = sign_submission(kit.signing, project="demo", run="demo", config=text)
        asyncio.run(ask(kit, "submit", run="demo", config=text, signature=signature))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = asyncio.run(ask(self.administrator, "status", run="demo"))
        return found

    def end_of_run(self, meanwhile: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
        """The status of the run once it is over; `meanwhile` is called with every one before, while somebody answers."""
        while True:
            try:
                status = self.status()
            except RunError:
                continue
            if status["state"] not in UNFINISHED:
                return status
            meanwhile(status)
            time.sleep(0.2)

    @property
    def run(self) -> Path:
        """The run's directory at the coordinator."""
        return self.folder / "coordinator" / "runs" / "demo"

    @property
    def rounds(self) -> int:
        """Published rounds, as the coordinator's folder has them."""
        file = self.run / "metrics.jsonl"
        return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0

    def wait_for(self, rounds: int) -> None:
        while self.rounds < rounds:
            time.sleep(0.01)

    def charges(self, site: str) -> int:
        """Of the run, in the site's own ledger."""
        (ledger,) = ledgers_at(str(self.folder / site / "state" / "runs" / "demo" / "ledger.sqlite"))
        return len(ledger.commitments)  # one for each; what they cost together takes long to work out
