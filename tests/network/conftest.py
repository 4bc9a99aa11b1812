"""Kits, and the real nats-server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_federated_lora.network.broker import Broker
from dp_federated_lora.network.provisioning import provision
from kits import Place, a_project, free_ports


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A provisioned folder with everybody's whole kit; copy it to change it."""
    out = tmp_path_factory.mktemp("kits")
    provision(a_project(), out, with_keys=True)
    return out


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A project whose broker is running."""
    out = tmp_path_factory.mktemp("place")
    project = a_project(*free_ports(1))
    provision(project, out, with_keys=True)
    with Broker(project, out / "broker"):
        yield Place(project, out)
