"""Programs of a federation are killed with SIGKILL at random moments and started again: nothing is lost, doubled or overspent."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from dp_federated_lora import train
from dp_federated_lora.errors import LedgerCorrupt, LedgerLocked, RunError
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.ledgers import ledgers_at
from dp_federated_lora.network import local
from dp_federated_lora.network.administration import ask
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.runs import UNFINISHED
from dp_federated_lora.network.submissions import sign_submission
from federation import adapter_bytes, networked

Raw = dict[str, dict[str, object]]
SITES = [f"client-{number}" for number in range(5)]


class Programs:
    """All programs of a federation as processes, by name."""

    def __init__(self, config: Config, folder: Path, stack: ExitStack) -> None:
        folder.mkdir()
        self.folder, self.stack, self.config = folder, stack, config
        self.project = local._project(SITES)
        self.kits = folder / "kits"
        provision(self.project, self.kits, with_keys=True)
        local._prepare_sites(config, SITES, folder)
        (folder / "project.toml").write_text(project_toml(self.project.model_dump()))
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("broker", "coordinator", *SITES):
            self.start(name)

    def start(self, name: str) -> None:
        broker = ["broker", str(self.folder / "project.toml"), str(self.kits)]
        words = broker if name == "broker" else local._words(name, self.folder)
        program = local._program(words, self.folder / f"{name}.log")
        self.running[name] = self.stack.enter_context(program)

    def kill(self, name: str) -> None:
        if name == "broker":  # its child is the broker itself
            found = subprocess.run(["pgrep", "-P", str(self.running[name].pid)], capture_output=True, text=True, check=False)
            children = found.stdout.split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
        self.running[name].kill()
        self.running[name].wait()


def project_toml(facts: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(facts)


def status_of(kit: Kit) -> dict[str, Any]:
    found: dict[str, Any] = asyncio.run(ask(kit, "status", run="demo"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victims", [["coordinator"], SITES, ["broker"], ["coordinator", *SITES, "broker"]], ids=str)
def test_killed_programs_come_back_and_the_adapter_is_the_simulators(
    raw_config: Raw, tmp_path: Path, victims: list[str], seed: int
):
    config, draw = networked(raw_config, rounds=12), random.Random(seed)
    expected = adapter_bytes(train(config, out=tmp_path / "simulated").path)
    with ExitStack() as stack:
        programs = Programs(config, tmp_path / "network", stack)
        kit, text = Kit.load(programs.kits / local.ADMINISTRATOR), config.to_toml()
        signature = sign_submission(kit.signing, project="demo", run="demo", config=text)
        asyncio.run(ask(kit, "submit", run="demo", config=text, signature=signature))
        kills, spent = 0, dict.fromkeys(SITES, 0)
        while True:
            try:
                status = status_of(kit)
            except RunError:
                continue
            if status["state"] not in UNFINISHED:
                break
            if status["state"] == "running" and kills < 8:
                victim = draw.choice(victims)
                time.sleep(draw.uniform(0.0, 1.5))
                programs.kill(victim)
                programs.start(victim)
                kills += 1
            for name in SITES:
                file = tmp_path / "network" / name / "state" / "runs" / "demo" / "ledger.sqlite"
                with suppress(LedgerCorrupt, LedgerLocked):  # it may be just beginning, or be written to
                    charges = ledgers_at(str(file))[0].spent().charges
                    assert charges >= spent[name]
                    spent[name] = charges
    assert (status["state"], status["reason"]) == ("finished", "")
    assert kills > 0
    run = tmp_path / "network" / "coordinator" / "runs" / "demo"
    (ledger,) = ledgers_at(str(run))
    assert (ledger.spent().charges, ledger.spent().released) == (12, 12)
    for name in SITES:
        (own,) = ledgers_at(str(tmp_path / "network" / name / "state" / "runs" / "demo" / "ledger.sqlite"))
        assert own.spent().charges == 12
    assert adapter_bytes(run) == expected
