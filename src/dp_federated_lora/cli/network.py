"""Commands of a federation over a network: who may connect, the programs, and what administrators ask for."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dp_federated_lora.cli.terminal import AsJson, print_json

if TYPE_CHECKING:
    from dp_federated_lora.network.kit import Kit

app = typer.Typer(rich_markup_mode=None)

SOON: Final = 30
"""Days before a certificate's end from which on its owner is told."""


@app.command(epilog="Example: dpfl provision project.toml provisioned/")
def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="The file that names the members.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The provisioner's folder; the same at every run.")],
    with_keys: Annotated[
        bool, typer.Option("--with-keys", help="Make everybody's private keys here: for one machine, demos and tests.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Invite the members of a project and sign the requests they sent back; exit code 1 if one cannot be signed."""
    from dataclasses import asdict  # noqa: PLC0415

    from dp_federated_lora.network.project import Project  # noqa: PLC0415
    from dp_federated_lora.network.provisioning import provision as provision_members  # noqa: PLC0415

    result = provision_members(Project.load(project), out, with_keys=with_keys)
    if as_json:
        print_json(asdict(result) | {"keys_made_here": with_keys})
        raise typer.Exit(1 if result.refused else 0)
    typer.echo(f"Authority {result.fingerprint}\nEvery member compares it, by another way, with what dpfl join prints.\n")
    for name, fingerprint in result.signed.items():
        typer.echo(f"signed     {name}: request {fingerprint}; send {out / name / 'kit.json'}")
    for name in result.renewed:
        typer.echo(f"renewed    {name}: others have joined; send {out / name / 'kit.json'}")
    for name in result.unchanged:
        typer.echo(f"unchanged  {name}")
    for name in result.waiting:
        typer.echo(f"waiting    {name}: send {out / name / 'invitation.json'}, put the answer into {out / name / 'request.json'}")
    for name, reason in result.refused.items():
        typer.echo(f"refused    {name}: {reason}")
    if with_keys:
        typer.echo(
            f"\nPRIVATE KEYS WERE MADE HERE: each folder of {out} is a whole kit, and its keys travel with it. For one machine, "
            "demos and tests; otherwise let members run dpfl join."
        )
    raise typer.Exit(1 if result.refused else 0)


@app.command(epilog="Example: dpfl join invitation.json kit/")
def join(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The file that the provisioner sent.")],
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The new folder; its private keys stay there.")],
    as_json: AsJson = False,
) -> None:
    """Make this member's private keys, and the request to send to the provisioner."""
    from dp_federated_lora.network.kit import join as join_project  # noqa: PLC0415

    invited, request = join_project(invitation, kit)
    if as_json:
        print_json(
            {
                "project": invited.project,
                "member": str(invited.member),
                "authority": invited.fingerprint,
                "request": request.fingerprint,
            }
        )
        return
    typer.echo(
        f'{invited.member} of "{invited.project}": made keys in {kit}\nauthority  {invited.fingerprint}\n'
        f"request    {request.fingerprint}\nCompare both with the provisioner, by another way than these files came. Then send "
        f"{kit / 'request.json'}, and put the answer into {kit / 'kit.json'}."
    )


KitPath = Annotated[Path, typer.Option("--kit", help="This member's folder of keys and kit.json.")]
State = Annotated[Path, typer.Option("--state", help="Where ledgers, runs and logs are kept; always the same folder.")]
MetricsPort = Annotated[int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics on this port; default none.")]
MetricsBind = Annotated[str, typer.Option(help="Address to serve metrics on: anybody who reaches it can read them.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


@app.command(epilog="Example: dpfl broker project.toml provisioned/")
def broker(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="The file that names the members.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of dpfl provision.")],
    server: Annotated[int, typer.Option(help="Which of the project's servers this is, from 0.")] = 0,
    bind: Annotated[str | None, typer.Option(help="Address to listen on; default the server's host.")] = None,
    route_ports: Annotated[list[int] | None, typer.Option(help="Ports between servers, one for each; repeatable.")] = None,
) -> None:
    """Run the broker between members, until it is asked to end."""
    import signal  # noqa: PLC0415

    from dp_federated_lora.errors import BrokerFailed  # noqa: PLC0415
    from dp_federated_lora.network.broker import Broker  # noqa: PLC0415
    from dp_federated_lora.network.project import Project  # noqa: PLC0415

    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    with Broker(Project.load(project), out / "broker", server=server, bind=bind, route_ports=route_ports or ()):
        typer.echo("ready")
        if signal.sigwait(ending) == signal.SIGCHLD:
            raise BrokerFailed(
                f"nats-server has ended by itself; see {out / 'broker' / f'broker-{server}.log'}, then start this again"
            )
    typer.echo("ended")


@app.command(epilog="Example: dpfl site --kit kit/ --data newswires.csv --data-set newswires --policy policy.toml --state state/")
def site(
    kit: KitPath,
    data: Annotated[str, typer.Option(help="This site's own table; it never leaves this machine.")],
    policy: Annotated[Path, typer.Option(help="policy.toml: what this site takes part in.")],
    state: State,
    data_set: Annotated[str, typer.Option(help="What policy.toml calls the data.")],
    threads: Annotated[int | None, typer.Option(help="Cores to compute on; default all.")] = None,
    metrics_port: MetricsPort = None,
    metrics_bind: MetricsBind = "127.0.0.1",
) -> None:
    """Take part in runs with this site's data, as far as its policy lets it, until it is asked to end."""
    from dp_federated_lora.data import resolve  # noqa: PLC0415
    from dp_federated_lora.errors import ConfigError  # noqa: PLC0415
    from dp_federated_lora.monitoring.prometheus import SiteMetrics, served  # noqa: PLC0415
    from dp_federated_lora.network.policy import SitePolicy  # noqa: PLC0415
    from dp_federated_lora.network.site import Site, serve  # noqa: PLC0415

    own, rules, metrics = _kit(kit), SitePolicy.load(policy), SiteMetrics()
    metrics.expires(own.expires)
    resolve(data)  # a name that is wrong is noticed now, not when the first run is offered
    if data_set not in (known := [each.name for each in rules.data_set]):
        raise ConfigError(f'{policy} allows nothing with the data set "{data_set}": name one of {known}, or add it there')
    with served(metrics, metrics_port, metrics_bind):
        here = Site(own, source=data, data_set=data_set, policy=rules, folder=state, threads=threads, metrics=metrics)
        _until_asked(lambda: serve(here, own, ready=lambda: typer.echo("ready")))


@app.command(epilog="Example: dpfl coordinator --kit kit/ --state state/")
def coordinator(
    kit: KitPath,
    state: State,
    database: Annotated[str | None, typer.Option(help="Where runs are listed: postgresql://user@host/database.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for one step of a secure sum.")] = 120.0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for sites to join.")] = 600.0,
    standby: Annotated[bool, typer.Option("--standby", help="Wait while another one works with STATE, and take over.")] = False,
    metrics_port: MetricsPort = None,
    metrics_bind: MetricsBind = "127.0.0.1",
) -> None:
    """Run what administrators submit, until it is asked to end; it goes on with what is unfinished."""
    from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics, served  # noqa: PLC0415
    from dp_federated_lora.network.coordinator import Coordinator, serve  # noqa: PLC0415

    own, metrics = _kit(kit), CoordinatorMetrics()
    metrics.expires(own.expires)
    with served(metrics, metrics_port, metrics_bind):
        here = Coordinator(
            own, folder=state, database=database, deadline=deadline, patience=patience, standby=standby, metrics=metrics
        )
        _until_asked(lambda: serve(here, ready=lambda: typer.echo("ready")))


@app.command(epilog="Example: dpfl submit newswire.toml --kit kit/ --name newswire-1")
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration file.")],
    kit: KitPath,
    name: Annotated[str, typer.Option(help="Name of the run, which no other has; default from the file's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Sign a run and ask a coordinator to start it."""
    from dp_federated_lora.lab import load_config  # noqa: PLC0415
    from dp_federated_lora.network.submissions import sign_submission  # noqa: PLC0415

    own, run, text = _administrator(kit), name or config.stem, load_config(config).to_toml()
    signature = sign_submission(own.signing, project=own.project, run=run, config=text)
    _print(_ask(own, "submit", run=run, config=text, signature=signature), as_json=as_json)


@app.command(epilog="Example: dpfl runs --kit kit/")
def runs(kit: KitPath, as_json: AsJson = False) -> None:
    """List all runs."""
    _print(_ask(_administrator(kit), "runs"), as_json=as_json)


@app.command(epilog="Example: dpfl status newswire-1 --kit kit/ --watch")
def status(
    run: RunName,
    kit: KitPath,
    watch: Annotated[bool, typer.Option("--watch", help="Print every change until the run is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands: its state, why it ended or was refused, rounds and spent epsilon."""
    import time  # noqa: PLC0415

    from dp_federated_lora.network.runs import UNFINISHED  # noqa: PLC0415

    own, last = _administrator(kit), None
    while True:
        found = _ask(own, "status", run=run)
        if found != last:
            _print(found if as_json else {key: value for key, value in found.items() if key != "rounds"}, as_json=as_json)
        last = found
        if not watch or found["state"] not in UNFINISHED:
            return
        time.sleep(2.0)


@app.command(epilog="Example: dpfl results newswire-1 newswire-1/ --kit kit/")
def results(
    run: RunName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder to bring them into.")],
    kit: KitPath,
    as_json: AsJson = False,
) -> None:
    """Bring the results of a run that is over: adapter, report, privacy figures and metrics of all rounds."""
    import asyncio  # noqa: PLC0415

    from dp_federated_lora.network.administration import fetch  # noqa: PLC0415

    _quiet()
    names = asyncio.run(fetch(_administrator(kit), run, out))
    _print({"folder": str(out), "files": names if as_json else ", ".join(names)}, as_json=as_json)


@app.command(epilog="Example: dpfl stop newswire-1 --kit kit/")
def stop(run: RunName, kit: KitPath, as_json: AsJson = False) -> None:
    """Stop a run for good; what it has published stays."""
    _print(_ask(_administrator(kit), "stop", run=run), as_json=as_json)


@app.command(epilog="Example: dpfl sites --kit kit/")
def sites(kit: KitPath, as_json: AsJson = False) -> None:
    """List the sites, and when the coordinator last heard of each."""
    _print(_ask(_administrator(kit), "sites"), as_json=as_json)


@app.command(epilog="Example: dpfl up examples/newswire-network.toml --out runs/network")
def up(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help='A configuration with privacy.trust = "distributed" or "local".')
    ],
    out: Annotated[Path, typer.Option(help="The new folder of this federation.")],
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine: broker, coordinator and sites as processes, the training table shared out."""
    from dp_federated_lora.lab import load_config  # noqa: PLC0415
    from dp_federated_lora.network.local import up as run_all  # noqa: PLC0415

    _quiet()

    def tell(found: dict[str, Any]) -> None:
        typer.echo(f"{found['state']}: round {found['round']}, epsilon {found['epsilon']:.4f}", err=as_json)

    _print(run_all(load_config(config), out, on_status=tell), as_json=as_json)
    typer.echo(f"report: {out / 'coordinator' / 'runs' / 'demo' / 'report.html'}", err=as_json)


def _kit(folder: Path) -> Kit:
    """A member's kit; says on standard error that it ends, if that is soon."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from dp_federated_lora.network.kit import Kit  # noqa: PLC0415

    kit = Kit.load(folder)
    if (left := (kit.expires - datetime.now(UTC)).days) < SOON:
        typer.echo(
            f"{folder / 'kit.json'} expires on {kit.expires:%Y-%m-%d}, in {left} days: ask the provisioner for a new one",
            err=True,
        )
    return kit


def _administrator(folder: Path) -> Kit:
    """An administrator's kit: nobody else may ask a coordinator, and would wait for an answer in vain."""
    from dp_federated_lora.errors import KitRefused  # noqa: PLC0415

    kit = _kit(folder)
    if kit.member.role != "admin":
        raise KitRefused(f"{folder} is the kit of {kit.member}, and only an administrator asks this: name an administrator's kit")
    return kit


def _quiet() -> None:
    """Without asyncio's remark on every TLS connection that the other side ends."""
    import logging  # noqa: PLC0415

    logging.getLogger("asyncio").setLevel(logging.ERROR)


def _ask(kit: Kit, verb: str, *, run: str = "", config: str = "", signature: str = "") -> Any:
    import asyncio  # noqa: PLC0415

    from dp_federated_lora.network.administration import ask  # noqa: PLC0415

    _quiet()
    return asyncio.run(ask(kit, verb, run=run, config=config, signature=signature))


def _until_asked(serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run until SIGINT or SIGTERM, and then end cleanly."""
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    _quiet()

    async def run() -> None:
        task = asyncio.ensure_future(serve())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            typer.echo("ended")

    asyncio.run(run())


def _print(found: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for row in found if isinstance(found, list) else [found]:
        facts = {
            key: f"{value:.4f}" if key == "epsilon" else value for key, value in row.items() if key != "rounds" and value != ""
        }
        typer.echo("  ".join(f"{key} {'never' if value is None else value}" for key, value in facts.items()))
