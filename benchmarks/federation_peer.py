"""What the peers of federation.py share: the arrays that travel, and a deployment on this machine that ends with its script.

Needs numpy, and nothing of any of the systems.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MARK: Final = "FEDERATION_PEER"
DEADLINE: Final = 1800.0
"""Seconds that a step of a deployment may take, so that a peer that hangs does not hold up the table."""


def answer(array: Array, site: int) -> Array:
    """What site 0, 1, ... returns: of the array's size, and no two alike, so that a peer cannot send one copy for all."""
    return array + np.float32(site)


def timed(sites: int, size: int, rounds: int, exchange: Callable[[Array], Iterable[Array]]) -> list[float]:
    """Seconds of each round after one that warms up: `exchange` sends an array to all sites and gives their answers."""
    seconds = []
    for number in range(rounds + 1):
        array = np.arange(size, dtype=np.float32) + np.float32(number)  # another one each time: stores know contents they saw
        start = time.perf_counter()
        total = np.sum(list(exchange(array)), axis=0, dtype=np.float64)
        seconds.append(time.perf_counter() - start)
        if not np.array_equal(total, sites * array.astype(np.float64) + sum(range(sites))):
            raise ValueError("the sum is wrong")
    return seconds[1:]


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody uses."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def await_port(port: int) -> None:
    """Return once something listens there."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


class Deployment:
    """A temporary folder and processes with a log, which end, with all that they started, when it is left."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = dict(os.environ) | {MARK: str(self.folder), "HOME": str(self.folder), "PATH": programs}
        self.log = self.folder / "log"
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Deployment:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes end then too
        return self

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """Start a process."""
        with self.log.open("ab") as log:
            command, folder = [str(word) for word in words], self.folder
            process = subprocess.Popen(command, env=self.environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def run(self, *words: object) -> None:
        """Run a process to its end."""
        if self.start(*words).wait(DEADLINE):
            raise ChildProcessError(f"{words[0]} failed")

    def running(self) -> list[int]:
        """Processes with our mark: the systems start their own, some of them in sessions of their own."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # ended meanwhile, or another user's
                continue
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while found := self.running():
            for process in found:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        for ended in self.started:
            ended.wait()
        if kind is not None and self.log.exists():
            sys.stderr.write(self.log.read_text(errors="replace"))
        shutil.rmtree(self.folder, ignore_errors=True)
