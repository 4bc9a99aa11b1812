"""Coordinator and sites over the real broker: the simulator's adapter, whatever is restarted, and refusals that say why."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dp_federated_lora import evaluate, train
from dp_federated_lora.errors import ConfigError, MessageRefused, RunError
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.network import administration
from dp_federated_lora.network import coordinator as coordinators
from dp_federated_lora.network import site as sites_
from dp_federated_lora.network.administration import ask, fetch
from dp_federated_lora.network.audit_log import verify
from dp_federated_lora.network.broker import Broker
from dp_federated_lora.network.coordinator import Coordinator
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.messages import VERSION, Offered, Refused, encode, from_site
from dp_federated_lora.network.policy import SitePolicy
from dp_federated_lora.network.project import Project
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.runs import UNFINISHED
from dp_federated_lora.network.site import Site
from dp_federated_lora.network.submissions import sign_submission
from federation import a_policy, adapter_bytes, networked, tables_of_sites
from kits import a_project, free_ports

Raw = dict[str, dict[str, object]]
ONE_PROCESS = threading.Lock()  # loading a model hides warnings, which threads of one process cannot do at the same time
SITES = [f"client-{number}" for number in range(5)]


class Federation:
    """Broker, coordinator and sites; programs are tasks of one loop that can be killed and started again."""

    def __init__(self, config: Config, folder: Path, policy: SitePolicy, *, servers: int = 1) -> None:
        self.config, self.folder, self.policy = config, folder, policy
        self.project: Project = a_project(*free_ports(servers), sites=SITES)
        provision(self.project, folder / "kits", with_keys=True)
        self.tables = tables_of_sites(config, folder)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        routes = free_ports(servers) if servers > 1 else []
        place = folder / "kits" / "broker"
        self.brokers = [Broker(self.project, place, server=number, route_ports=routes) for number in range(servers)]
        self.broker = self.brokers[0]
        self.coordinator: Coordinator | None = None

    def kit(self, name: str) -> Kit:
        return Kit.load(self.folder / "kits" / name)

    def site(self, name: str) -> Site:
        site = Site(
            self.kit(name),
            source=str(self.tables[name]),
            data_set="texts",
            policy=self.policy,
            folder=self.folder / name,
            threads=1,
        )
        handle = site.handle

        def one_at_a_time(data: bytes) -> bytes | None:
            with ONE_PROCESS:
                return handle(data)

        site.handle = one_at_a_time  # type: ignore[method-assign]
        return site

    async def start(self, name: str) -> None:
        ready = asyncio.Event()
        if name in SITES:
            work: Coroutine[Any, Any, None] = sites_.serve(self.site(name), self.kit(name), ready=ready.set)
        else:
            self.coordinator = Coordinator(self.kit("main"), folder=self.folder / "main", deadline=20.0, patience=60.0)
            work = coordinators.serve(self.coordinator, ready=ready.set)
        self.tasks[name] = asyncio.create_task(work)
        await ready.wait()

    async def kill(self, name: str) -> None:
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])

    async def submit(self, person: str = "alice", run: str = "first", **changes: str) -> Any:
        kit, text = self.kit(person), self.config.to_toml()
        signature = sign_submission(kit.signing, project="lungs", run=run, config=text)
        return await ask(kit, "submit", **({"run": run, "config": text, "signature": signature} | changes))

    async def end(self, run: str = "first", meanwhile: Callable[[int], Awaitable[None]] | None = None) -> dict[str, Any]:
        """The status of a run that is over; `meanwhile` is called with the number of rounds so far."""
        while True:
            status: dict[str, Any] = await ask(self.kit("bob"), "status", run=run)
            if status["state"] not in UNFINISHED:
                return status
            if meanwhile is not None:
                await meanwhile(status["round"])
            await asyncio.sleep(0.02)

    @property
    def run_folder(self) -> Path:
        return self.folder / "main" / "runs" / "first"


@asynccontextmanager
async def running(
    config: Config, folder: Path, *, policy: SitePolicy | None = None, servers: int = 1
) -> AsyncIterator[Federation]:
    folder.mkdir()
    federation = Federation(config, folder, policy or a_policy(config), servers=servers)
    with ExitStack() as brokers:
        for broker in federation.brokers:
            brokers.enter_context(broker)
        try:
            for name in (*SITES, "main"):
                await federation.start(name)
            yield federation
        finally:
            for name in list(federation.tasks):
                await federation.kill(name)


def test_a_site_that_runs_is_heard_of_without_a_run_and_one_that_does_not_is_not(raw_config: Raw, tmp_path: Path):
    async def scenario() -> None:
        async with running(networked(raw_config), tmp_path / "network") as federation:
            await federation.kill("client-3")
            await federation.kill("main")
            await federation.start("main")
            await federation.kill("client-1")
            await federation.start("client-1")
            while (heard := {each["site"]: each["heard_seconds_ago"] for each in await ask(federation.kit("bob"), "sites")}) and (
                heard["client-1"] is None
            ):
                await asyncio.sleep(0.1)
            assert heard["client-1"] < sites_.PRESENT_EVERY and heard["client-3"] is None

    asyncio.run(scenario())


@pytest.mark.parametrize("trust", ["distributed", "local"])
def test_a_run_over_the_network_gives_the_simulators_adapter_to_the_bit(raw_config: Raw, tmp_path: Path, trust: str):
    config = networked(raw_config, trust=trust)
    simulated = train(config, out=tmp_path / "simulated")

    async def scenario() -> None:
        async with running(config, tmp_path / "network") as federation:
            assert (await federation.submit())["state"] in UNFINISHED
            assert (await federation.submit())["state"] in UNFINISHED  # the same again changes nothing
            with pytest.raises(RunError, match="its results are there once it is over"):
                await fetch(federation.kit("bob"), "first", tmp_path / "early")
            status = await federation.end()
            assert (status["state"], status["reason"]) == ("finished", "")
            assert adapter_bytes(federation.run_folder) == adapter_bytes(simulated.path)
            assert [round_["round"] for round_ in status["rounds"]] == [1, 2, 3]
            assert [run["run"] for run in await ask(federation.kit("bob"), "runs")] == ["first"]
            heard = await ask(federation.kit("bob"), "sites")
            assert [each["site"] for each in heard] == SITES
            assert all(each["heard_seconds_ago"] is not None for each in heard)
            names = await fetch(federation.kit("bob"), "first", tmp_path / "fetched")
            assert not [name for name in names if "ledger" in name or "state" in name or name.endswith((".log", ".key"))]
            assert evaluate(tmp_path / "fetched") == evaluate(federation.run_folder)
            with pytest.raises(RunError, match="exists and is never overwritten"):
                await fetch(federation.kit("bob"), "first", tmp_path / "fetched")
        acts = [entry.act for entry in verify(tmp_path / "network" / "main" / "audit.jsonl").entries]
        assert "submitted a run" in acts
        acts = [entry.act for entry in verify(tmp_path / "network" / "client-1" / "audit.jsonl").entries]
        assert [act for act in acts if "run" in act] == ["joined a run", "ended a run"]

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["../adapter.bin", "/tmp/adapter.bin", "adapter/../../x"])
def test_a_coordinator_cannot_write_outside_of_the_folder_that_was_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def lie(*_: object, **__: object) -> dict[str, str]:
        return {"report.html": "", name: ""}

    monkeypatch.setattr(administration, "ask", lie)
    with pytest.raises(MessageRefused, match="outside of"):
        asyncio.run(fetch(None, "first", tmp_path / "results"))  # type: ignore[arg-type]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("victim", ["main", "client-3", "broker"])
def test_whatever_is_restarted_in_the_middle_the_adapter_is_the_undisturbed_one(raw_config: Raw, tmp_path: Path, victim: str):
    config = networked(raw_config)
    simulated = train(config, out=tmp_path / "simulated")

    async def scenario() -> None:
        async with running(config, tmp_path / "network") as federation:
            done: set[int] = set()

            async def restart(rounds: int) -> None:
                if rounds in done or rounds == 3:
                    return
                done.add(rounds)
                if victim == "broker":
                    await asyncio.to_thread(federation.broker.stop)
                    await asyncio.to_thread(federation.broker.start)
                else:
                    await federation.kill(victim)
                    await federation.start(victim)

            await federation.submit()
            status = await federation.end(meanwhile=restart)
            assert (status["state"], status["reason"]) == ("finished", "")
            assert done
            assert adapter_bytes(federation.run_folder) == adapter_bytes(simulated.path)

    asyncio.run(scenario())


def test_a_cluster_of_three_goes_on_when_one_server_is_gone(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    simulated = train(config, out=tmp_path / "simulated")

    async def scenario() -> None:
        async with running(config, tmp_path / "network", servers=3) as federation:
            gone: list[int] = []

            async def stop(rounds: int) -> None:
                if rounds == 1 and not gone:
                    gone.append(rounds)
                    await asyncio.to_thread(federation.broker.stop)

            await federation.submit()
            status = await federation.end(meanwhile=stop)
            assert (status["state"], status["reason"], gone) == ("finished", "", [1])
            assert adapter_bytes(federation.run_folder) == adapter_bytes(simulated.path)

    asyncio.run(scenario())


def test_a_coordinator_that_stands_by_takes_over_when_the_first_is_killed(tmp_path: Path):
    provision(a_project(coordinators=["main", "spare"]), tmp_path / "kits", with_keys=True)
    script = "import sys; from pathlib import Path; from dp_federated_lora.network.coordinator import Coordinator; "
    script += "from dp_federated_lora.network.kit import Kit; "
    script += "Coordinator(Kit.load(Path(sys.argv[1])), folder=Path(sys.argv[2]), standby=sys.argv[3] == '1'); "
    script += "print('active', flush=True); sys.stdin.read()"

    def start(name: str, standby: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", script, str(tmp_path / "kits" / name), str(tmp_path / "state"), standby]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start("main", "0") as first:
        assert first.stdout and first.stdout.readline() == "active\n"
        with start("spare", "0") as refused:
            assert "another process is working" in refused.communicate()[1]
        with start("spare", "1") as second:
            first.kill()
            assert second.stdout and second.stdout.readline() == "active\n"
            second.kill()


def test_a_policy_that_refuses_shows_rule_and_numbers_in_the_status(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)

    async def scenario() -> None:
        async with running(config, tmp_path / "network", policy=a_policy(config, max_epsilon=1.0)) as federation:
            await federation.submit()
            status = await federation.end()
            assert status["state"] == "failed"
            assert "plan.max_epsilon" in status["reason"]
            assert "client-" in status["reason"]
            assert "8" in status["reason"]
            assert not federation.run_folder.exists()
            with pytest.raises(RunError, match="has no results: it failed"):
                await fetch(federation.kit("bob"), "first", tmp_path / "nothing")

    asyncio.run(scenario())


def test_a_run_is_stopped_for_good_and_keeps_what_it_published(raw_config: Raw, tmp_path: Path):
    raw_config["privacy"]["rounds"] = 3
    config = networked(raw_config).model_copy()

    async def scenario() -> None:
        async with running(config, tmp_path / "network") as federation:

            async def stop(rounds: int) -> None:
                if rounds == 1:
                    await ask(federation.kit("alice"), "stop", run="first")

            await federation.submit()
            status = await federation.end(meanwhile=stop)
            assert status["state"] in ("stopped", "finished")  # it may have ended before it heard of it
            assert (federation.run_folder / "adapter" / "head.safetensors").exists()
            assert (await ask(federation.kit("alice"), "stop", run="first"))["state"] == "stopping"  # twice is once
            with pytest.raises(RunError, match="there is no run other"):
                await ask(federation.kit("alice"), "stop", run="other")

    asyncio.run(scenario())


def test_who_may_not_submit_or_lies_about_a_run_is_refused_by_broker_coordinator_and_site(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)

    async def scenario() -> None:
        async with running(config, tmp_path / "network") as federation:
            with pytest.raises(RunError, match="no right to submit"):
                await federation.submit("bob")
            with pytest.raises(RunError, match="not signed by alice"):
                await federation.submit(run="second", signature="00" * 64)
            with pytest.raises(MessageRefused, match="small letters"):
                await federation.submit(run="../escape")
            text = config.to_toml().replace('trust = "distributed"', 'trust = "central"').replace("[secure_sum]", "[secure_sums]")
            with pytest.raises(RunError, match="secure_sums"):
                key = federation.kit("alice").signing
                signed = sign_submission(key, project="lungs", run="third", config=text)
                await federation.submit(run="third", config=text, signature=signed)
            await federation.kill("client-1")
            site = federation.site("client-1")
            made_up = Offered(VERSION, "made-up", "0.2.0", config.to_toml(), "ab" * 32, "alice", "00" * 64, tuple(SITES))
            answer = from_site(site.handle(encode(made_up)) or b"")
            assert isinstance(answer, Refused)
            assert "not signed by alice" in answer.reasons[0]
            assert site.handle(b"garbage") is None
            with pytest.raises(RunError, match="another process is working"):
                federation.site("client-1")
            site.close()
        trail = verify(tmp_path / "network" / "main" / "audit.jsonl")
        assert any("was refused: submit" in entry.act for entry in trail.entries)

    asyncio.run(scenario())


def test_a_run_without_noise_from_sites_or_for_another_number_of_sites_fails_with_the_reason(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)

    async def scenario() -> None:
        async with running(config, tmp_path / "network") as federation:
            raw_config["federation"]["clients"] = 6
            federation.config = parse_config(raw_config, where="test")
            await federation.submit()
            status = await federation.end()
            assert "5 sites have joined the project, federation.clients says 6" in status["reason"]
            raw_config["privacy"]["trust"] = "central"
            del raw_config["secure_sum"]
            federation.config = parse_config(raw_config, where="test")
            with pytest.raises(RunError, match="never leave a site"):
                await federation.submit(run="second")

    asyncio.run(scenario())


def test_a_site_without_a_policy_joins_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="a site without one joins nothing"):
        SitePolicy.load(tmp_path / "policy.toml")
