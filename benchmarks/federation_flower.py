"""Rounds of a Flower deployment on this machine, for federation.py: a SuperLink, a SuperNode for each site, plain arrays; JSON.

    python benchmarks/federation_flower.py SITES SIZE ROUNDS

As Flower comes, save for what needs the internet: without TLS, a new process for each message to a client, and pauses of 1 to 3
seconds between looks for messages. This file is the Flower app too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from federation_peer import Array, Deployment, answer, await_port, free_ports, timed
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

CONFIG: Final = """\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""
PROJECT: Final = """\
[project]
name = "rounds"
version = "1.0.0"
description = "Rounds of plain arrays"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "federation_flower:server_app"
clientapp = "federation_flower:client_app"

[tool.flwr.app.config]
sites = {sites}
size = {size}
rounds = {rounds}
out = "{out}"
"""
server_app = ServerApp()
client_app = ClientApp()


@client_app.train()
def add(message: Message, context: Context) -> Message:
    """One site's answer."""
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord([answer(array, int(context.node_config["site"]))])
    return Message(content=RecordDict({"arrays": arrays}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Wait for all sites, then time rounds."""
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["sites"]:
        time.sleep(0.1)

    def exchange(array: Array) -> Iterable[Array]:
        content = RecordDict({"arrays": ArrayRecord([array])})
        messages = [Message(content=content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
        return [reply.content["arrays"].to_numpy_ndarrays()[0] for reply in grid.send_and_receive(messages)]

    seconds = timed(config["sites"], config["size"], config["rounds"], exchange)
    Path(config["out"]).write_text(json.dumps({"seconds": seconds}))


def main() -> None:
    """Deploy, run the app and print what it found."""
    sites, size, rounds = map(int, sys.argv[1:])
    port, *others = free_ports(1 + sites)
    with Deployment() as here:
        app, out = here.folder / "app", here.folder / "seconds.json"
        app.mkdir()
        for module in ("federation_flower.py", "federation_peer.py"):
            shutil.copy(Path(__file__).with_name(module), app)
        (app / "pyproject.toml").write_text(PROJECT.format(sites=sites, size=size, rounds=rounds, out=out))
        (here.folder / "config.toml").write_text(CONFIG.format(port=port))
        offline = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        here.environment |= {"FLWR_HOME": str(here.folder)} | offline
        here.start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", port)
        await_port(port)
        for site, own in enumerate(others):
            link = ("--superlink", f"127.0.0.1:{port}")
            here.start("flower-supernode", "--insecure", *link, "--port", own, "--node-config", f"site={site}")
        here.run("flwr", "run", app, "--stream")
        print(out.read_text())


if __name__ == "__main__":
    main()
