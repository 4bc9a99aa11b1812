"""A round of a federation over the real broker: many sites, secure aggregation, real messages and cryptography; no training.

    python benchmarks/federation.py [--sites 10 100 1000] [--size 147456] [--rounds 3] [--processes 2]
        [--python-flower PATH] [--python-nvflare PATH]

Sites are light: each has its own certificate, connection and state machine, and hands in a fixed vector instead of an update;
many share a process. The request carries `size` float32 numbers to every site. The coordinator's side is that of `dpfl
coordinator`. Wall-clock seconds of a round, from the request to the opened sum, which is checked; the tail is from the last
message to the opened sum. Sites, coordinator and broker share this machine.

With an interpreter that has flwr or nvflare, a second table: a round at 10 sites and 250,000 numbers each way, ours and theirs,
each site in a process of its own, on this machine. The peers are deployed as they come, with their pauses between looks for work,
and send plain arrays, Flower without TLS; ours includes TLS and every step of secure aggregation. Theirs are rounds after one
that warms up; ours have none before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from federation_peer import free_ports

from dp_federated_lora.federated import Purpose, Request, terms_of
from dp_federated_lora.monitoring.log import open_log
from dp_federated_lora.network.broker import Broker
from dp_federated_lora.network.connection import Connection
from dp_federated_lora.network.exchange import SiteExchange
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.messages import VERSION, Answered, Asked, encode, to_site
from dp_federated_lora.network.parts import Assembly
from dp_federated_lora.network.project import Member, Project
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.subjects import inbox_of, outbox_of
from dp_federated_lora.privacy import Budget, Permit, PoissonSampler, PrivacyPlan, PrivacyUnit, SecureRandom, Trust
from dp_federated_lora.runtime import decode_request
from dp_federated_lora.secagg import STAGES, ClientSession, SharedNoise

COORDINATOR: Final = "coordinator"
PEERS: Final = ("flower", "nvflare")
PEER_SITES: Final = 10
PEER_SIZE: Final = 250_000


def a_plan(sites: int) -> PrivacyPlan:
    """Any plan whose sums are of so many sites, a twentieth of which may drop out and a twentieth collude."""
    noise = SharedNoise(
        noise_multiplier=1.0, bits=24, max_cohort=sites, min_cohort=sites - sites // 20, colluders=max(1, sites // 20)
    )
    return PrivacyPlan(
        unit=PrivacyUnit.CLIENT,
        trust=Trust.DISTRIBUTED,
        sampler=PoissonSampler(1.0),
        clip_norm=1.0,
        mechanism=noise,
        rounds=1000,
        divisor=float(sites),
        budget=Budget(1e6, 1e-5),
        sites=sites,
    )


# --- sites: one process for many ------------------------------------------------------------------------


class LightSite:
    """Answers every step as a site does, with a fixed vector."""

    def __init__(self, kit: Kit, plan: PrivacyPlan, size: int) -> None:
        self.kit, self.plan, self.size = kit, plan, size
        self.session: ClientSession | None = None
        self.parts = Assembly()

    def answer(self, message: Asked) -> bytes:
        if message.stage == 0:
            request = decode_request(message.request)
            roster = {name: self.kit.roster[name] for name in message.members}
            sent = message.request
            terms = terms_of(request, self.plan, size=self.size, sum_id=message.sum_id, sent=sent, roster=roster)
            self.session = ClientSession(self.kit.member.name, terms, self.kit.signing)
        assert self.session is not None
        integers = None
        if STAGES[message.stage] == "mask":
            integers = np.full(self.session.terms.size, int(self.kit.member.name[5:]), dtype=np.int64)
        body = self.session.answer(message.body, integers)
        return encode(Answered(VERSION, message.run, message.sum_id, message.stage, body))


async def be_sites(out: Path, names: list[str], plan: PrivacyPlan, size: int) -> None:
    """Connect all, say so, and answer until the process is ended."""

    async def be(name: str) -> None:
        kit = Kit.load(out / name)
        site, connection = LightSite(kit, plan, size), await Connection.connect(kit, report=lambda _: None)
        inbox = await connection.subscribe(inbox_of(kit.member))
        connected.append(name)
        if len(connected) == len(names):
            print("ready", flush=True)
        async for message in inbox:
            whole = site.parts.take(message.data)
            asked = None if whole is None else to_site(whole)
            if isinstance(asked, Asked):
                await connection.send(outbox_of(kit.member), site.answer(asked))

    connected: list[str] = []
    await asyncio.gather(*(be(name) for name in names))


# --- the coordinator ------------------------------------------------------------------------------------


class Link:
    """The link of a `SiteExchange` over one connection, whose loop runs in a thread."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.queue, self.bytes = kit, queue.Queue[tuple[str, bytes]](), 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.connection = asyncio.run_coroutine_threadsafe(self.connect(), self.loop).result()
        self.last = 0.0

    async def connect(self) -> Connection:
        connection = await Connection.connect(self.kit)
        for site in self.kit.roster:
            inbox = await connection.subscribe(outbox_of(Member("site", site)))
            self.loop.create_task(self.hear(site, inbox))
        return connection

    async def hear(self, site: str, inbox: object) -> None:
        parts = Assembly()
        async for message in inbox:  # type: ignore[attr-defined]
            self.bytes += len(message.data)
            whole = parts.take(message.data)
            if whole is not None:
                self.queue.put((site, whole))

    def send(self, site: str, data: bytes) -> None:
        sending = self.connection.send(inbox_of(Member("site", site)), data)
        asyncio.run_coroutine_threadsafe(sending, self.loop).result()

    def receive(self, timeout: float) -> tuple[str, bytes] | None:
        try:
            found = self.queue.get(timeout=max(timeout, 0.001))
        except queue.Empty:
            return None
        self.last = time.perf_counter()
        return found


@dataclass(frozen=True)
class Rounds:
    """What rounds took: seconds and memory by round, and bytes from a site in one."""

    sites: int
    seconds: list[float]
    tails: list[float]
    sent: float
    memory: list[float]

    def row(self) -> str:
        """A row of the table."""
        return (
            f"| {self.sites:,} | {statistics.median(self.seconds):.2f} | {min(self.seconds):.2f} to {max(self.seconds):.2f} | "
            f"{statistics.median(self.tails):.2f} | {self.sent / 1e3:,.0f} | "
            f"{self.memory[0]:,.0f} to {self.memory[-1]:,.0f} |"
        )


def measured(sites: int, size: int, rounds: int, processes: int) -> Rounds:
    """What rounds of so many sites take."""
    with tempfile.TemporaryDirectory() as folder:
        return measured_in(Path(folder), sites, size, rounds, processes)


def measured_in(folder: Path, sites: int, size: int, rounds: int, processes: int) -> Rounds:
    """Start a broker and the sites, and run the rounds."""
    names = [f"site-{number:04d}" for number in range(sites)]
    project = Project.model_validate(
        {
            "name": "bench",
            "days": 1,
            "sites": names,
            "coordinators": [COORDINATOR],
            "administrators": {"nobody": ["view"]},
            "servers": [{"host": "127.0.0.1", "port": free_ports(1)[0]}],
        }
    )
    provision(project, folder, with_keys=True)
    plan = a_plan(sites)
    with Broker(project, folder / "broker"):
        words = [sys.executable, __file__, "--be-sites", str(folder), "--size", str(size)]
        groups = [names[first::processes] for first in range(processes)]  # neighbours in line are asked at the same time
        running = [
            subprocess.Popen([*words, "--names", *group, "--of", str(sites)], stdout=subprocess.PIPE, text=True)
            for group in groups
        ]
        try:
            for process in running:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    sys.exit("a process of sites did not start")
            return run(names, plan, size, rounds, folder)
        finally:
            for process in running:
                process.terminate()
                process.wait()


def run(names: list[str], plan: PrivacyPlan, size: int, rounds: int, folder: Path) -> Rounds:
    """Run rounds as the coordinator."""
    kit = Kit.load(folder / COORDINATOR)
    link = Link(kit)
    log = open_log(folder / "bench.log", run="bench")
    exchange = SiteExchange(
        "bench", names, plan, roster=kit.roster, link=link, folder=folder / "sums", deadline=600.0, again=60.0, log=log
    )
    request = Request(Purpose.TRAINING, 1, plan.content_id, {"lora_B": torch.zeros(size)}, 1.0)
    seconds, tails, memory = [], [], []
    for number in range(rounds):
        streams: Mapping[str, tuple[Permit, SecureRandom]] = {
            name: (None, SecureRandom.insecure_from(number).derive(name))  # type: ignore[misc]  # sites charge themselves
            for name in names
        }
        start = time.perf_counter()
        total = exchange.opened(request, streams, names, size=size)
        end = time.perf_counter()
        seconds.append(end - start)
        tails.append(end - link.last)
        expected = sum(int(name[5:]) for name in names) % (1 << 24)
        if not bool((total == expected).all()):
            sys.exit("the sum is wrong")
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    asyncio.run_coroutine_threadsafe(link.connection.close(), link.loop).result()
    return Rounds(len(names), seconds, tails, link.bytes / rounds / len(names), memory)


# --- peers ----------------------------------------------------------------------------------------------


def compare(pythons: Mapping[str, str], rounds: int) -> None:
    """Print the table of ours and the peers, each with its interpreter."""
    ours = statistics.median(measured(PEER_SITES, PEER_SIZE, rounds, processes=PEER_SITES).seconds)
    print(f"\n{PEER_SITES} sites, {PEER_SIZE:,} numbers each way\n")
    print("| system | seconds of a round (median) | times ours |\n|---|---|---|")
    print(f"| ours, secure aggregation | {ours:.2f} | 1 |", flush=True)
    for name, python in pythons.items():
        script = Path(__file__).with_name(f"federation_{name}.py")
        words = [python, str(script), str(PEER_SITES), str(PEER_SIZE), str(rounds)]
        found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        seconds = statistics.median(found["seconds"])
        print(f"| {name}, plain arrays | {seconds:.2f} | {seconds / ours:.1f} |", flush=True)


def main() -> None:
    """Parse arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--size", type=int, default=147_456)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    for peer in PEERS:
        parser.add_argument(f"--python-{peer}", help="interpreter that has the peer; without it, the peer is left out")
    parser.add_argument("--be-sites", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    torch.set_num_threads(1)
    if arguments.be_sites:
        asyncio.run(be_sites(arguments.be_sites, arguments.names, a_plan(arguments.of), arguments.size))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.size:,} numbers each way\n")
    print("| sites | seconds of a round (median) | range | of it tail | kB from a site | coordinator's MB, first to last round |")
    print("|---|---|---|---|---|---|")
    for sites in arguments.sites:
        print(measured(sites, arguments.size, arguments.rounds, arguments.processes).row(), flush=True)
    if pythons := {peer: python for peer in PEERS if (python := getattr(arguments, f"python_{peer}"))}:
        compare(pythons, arguments.rounds)


if __name__ == "__main__":
    main()
