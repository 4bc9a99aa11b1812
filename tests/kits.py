"""Projects on this machine, for tests that need kits or the real broker."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.project import Project


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def a_project(*ports: int, **changes: Any) -> Project:
    raw = {
        "name": "lungs",
        "days": 30,
        "sites": ["a", "b"],
        "coordinators": ["main"],
        "administrators": {"alice": ["submit", "stop", "view"], "bob": ["view"]},
        "servers": [{"host": "127.0.0.1", "port": port} for port in ports or (4222,)],
    }
    return Project.model_validate(raw | changes)


@dataclass(frozen=True)
class Place:
    """A provisioned project: every kit is in `out` by its member's name, the broker's files in `out` / "broker"."""

    project: Project
    out: Path

    def kit(self, name: str) -> Kit:
        return Kit.load(self.out / name)
