"""Sites behind a bad network: cut off for a while, and slow with losses. Each is in a network namespace of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dp_federated_lora import train
from federation import adapter_bytes, networked
from programs import SITES, Programs

Raw = dict[str, dict[str, object]]
HERE, THERE = "10.213.77.1", "10.213.77.2"


def ip(*words: str, tool: str = "ip") -> None:
    """Run `ip` or `tc`; skip the test where this machine does not let it."""
    try:
        done = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"{tool} (iproute2) is not installed")
    if done.returncode:
        pytest.skip(f"this machine refuses `{tool} {' '.join(words)}`: {done.stderr.strip()}")


@pytest.fixture
def space() -> Iterator[tuple[str, str]]:
    """A network namespace, and this side's end of the only cable into it."""
    name, end = f"dpfl-{os.getpid()}", f"dpfl{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", end, "type", "veth", "peer", "name", "there", "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", end)
        ip("link", "set", end, "up")
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", "there")
        ip("-n", name, "link", "set", "there", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, end
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", end], check=False, capture_output=True)


def run_behind(space: str, raw: Raw, folder: Path, sites: list[str], meanwhile: Callable[[], None]) -> None:
    """A run whose `sites` are in the namespace gives what the simulator does, and nobody pays twice."""
    config = networked(raw, rounds=12)
    expected = adapter_bytes(train(config, out=folder / "simulated").path)
    with ExitStack() as stack:
        within = {name: ["ip", "netns", "exec", space] for name in sites}
        programs = Programs(config, folder / "network", stack, host=HERE, within=within)
        programs.submit()
        status = programs.end_of_run(lambda found: meanwhile() if found["state"] == "running" else None)
    assert (status["state"], status["reason"]) == ("finished", "")
    assert [programs.charges(name) for name in SITES] == [12] * len(SITES)
    assert adapter_bytes(programs.run) == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sites_that_are_cut_off_for_a_while_go_on_afterwards(space: tuple[str, str], raw_config: Raw, tmp_path: Path):
    cuts = iter([1.0, 8.0, 3.0])

    def cut() -> None:
        if (seconds := next(cuts, None)) is not None:
            ip("link", "set", space[1], "down")
            time.sleep(seconds)
            ip("link", "set", space[1], "up")

    run_behind(space[0], raw_config, tmp_path, SITES[:2], cut)
    assert next(cuts, None) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_network_that_loses_packets_changes_nothing(space: tuple[str, str], raw_config: Raw, tmp_path: Path):
    ip("qdisc", "add", "dev", space[1], "root", "netem", "delay", "100ms", "20ms", "loss", "3%", tool="tc")
    run_behind(space[0], raw_config, tmp_path, SITES, lambda: None)
