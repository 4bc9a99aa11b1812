"""Rounds of an NVFLARE deployment on this machine, for federation.py: a server, a client for each site, plain arrays; JSON.

    python benchmarks/federation_nvflare.py SITES SIZE ROUNDS

As NVFLARE comes, provisioned with certificates: mutual TLS, the job in one process on each side, and pauses of 2 seconds between
looks for tasks, which a job may shorten. The executor runs in the client's process. This file holds the job's code too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from federation_peer import DEADLINE, Array, Deployment, answer, await_port, free_ports, timed
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.lighter.utils import update_storage_locations

ADMINISTRATOR: Final = "admin@bench.org"
BUILDERS: Final = (
    "workspace.WorkspaceBuilder",
    "static_file.StaticFileBuilder",
    "cert.CertBuilder",
    "signature.SignatureBuilder",
)


class Rounds(ModelController):
    """Times rounds with all clients."""

    def __init__(self, sites: int, size: int, rounds: int, out: str) -> None:
        super().__init__(persistor_id="")
        self.sites, self.size, self.rounds, self.out = sites, size, rounds, out

    def run(self) -> None:
        """What the server does in the job."""
        seconds = timed(self.sites, self.size, self.rounds, self.exchange)
        Path(self.out).write_text(json.dumps({"seconds": seconds}))

    def exchange(self, array: Array) -> Iterable[Array]:
        """Send to all and wait."""
        model = FLModel(params={"array": array}, params_type=ParamsType.FULL)
        return [reply.params["array"] for reply in self.send_model_and_wait(data=model)]


class Site(Executor):
    """One site's answer."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """What the client does with a task."""
        array = FLModelUtils.from_shareable(shareable).params["array"]
        site = int(fl_ctx.get_identity_name().removeprefix("site-"))
        return FLModelUtils.to_shareable(FLModel(params={"array": answer(array, site)}, params_type=ParamsType.FULL))


def project(sites: int, port: int) -> dict[str, Any]:
    """What is provisioned."""
    server = {"name": "server", "type": "server", "default_host": "localhost", "fed_learn_port": port, "admin_port": port}
    administrator = {"name": ADMINISTRATOR, "type": "admin", "role": "project_admin"}
    participants: list[dict[str, Any]] = [
        server,
        administrator,
        *({"name": f"site-{site}", "type": "client"} for site in range(sites)),
    ]
    builders: list[dict[str, Any]] = [{"path": f"nvflare.lighter.impl.{builder}"} for builder in BUILDERS]
    builders[0]["args"] = {"template_file": ["master_template.yml"]}
    return {
        "api_version": 3,
        "name": "bench",
        "participants": [{"org": "bench"} | participant for participant in participants],
        "builders": builders,
    }


def write_job(folder: Path, sites: int, arguments: dict[str, Any]) -> None:
    """A job of one app, the same on the server and on every client."""
    config, code = folder / "app" / "config", folder / "app" / "custom"
    config.mkdir(parents=True)
    code.mkdir()
    for module in ("federation_nvflare.py", "federation_peer.py"):
        shutil.copy(Path(__file__).with_name(module), code)
    workflow = {"id": "rounds", "path": "federation_nvflare.Rounds", "args": arguments}
    executor = {"tasks": ["train"], "executor": {"path": "federation_nvflare.Site", "args": {}}}
    parts = {
        folder / "meta.json": {"name": "rounds", "min_clients": sites, "deploy_map": {"app": ["@ALL"]}, "resource_spec": {}},
        config / "config_fed_server.json": {"format_version": 2, "workflows": [workflow], "components": []},
        config / "config_fed_client.json": {"format_version": 2, "executors": [executor], "components": []},
    }
    for path, content in parts.items():
        path.write_text(json.dumps(content))


def run_job(kit: Path, job: Path, sites: int) -> None:
    """Submit the job once all clients are there, and wait for its end."""
    session = new_secure_session(ADMINISTRATOR, str(kit), timeout=DEADLINE)
    try:
        end = time.monotonic() + DEADLINE
        while len(session.get_connected_client_list()) < sites:
            if time.monotonic() > end:
                raise TimeoutError("not all clients connected")
            time.sleep(1)
        session.wait_for_job(session.submit_job(str(job)), timeout=DEADLINE)
    finally:
        session.close()


def main() -> None:
    """Provision, deploy, run the job and print what it found."""
    sites, size, rounds = map(int, sys.argv[1:])
    (port,) = free_ports(1)
    with Deployment() as here:
        description, job, out = here.folder / "project.yml", here.folder / "rounds", here.folder / "seconds.json"
        description.write_text(json.dumps(project(sites, port)))
        here.run("nvflare", "provision", "-p", description, "-w", here.folder, "--force")
        kits = here.folder / "bench" / "prod_00"
        update_storage_locations(str(kits / "server" / "local"), str(here.folder))  # else outside our folder
        here.start(kits / "server" / "startup" / "sub_start.sh", "--once")
        await_port(port)
        for site in range(sites):
            here.start(kits / f"site-{site}" / "startup" / "sub_start.sh", "--once")
        write_job(job, sites, {"sites": sites, "size": size, "rounds": rounds, "out": str(out)})
        with redirect_stdout(sys.stderr):  # it tells of its steps
            run_job(kits / ADMINISTRATOR, job, sites)
        print(out.read_text())


if __name__ == "__main__":
    main()
