"""Commands about what a site allows and what people did there: policies and audit logs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dp_federated_lora.cli.terminal import AsJson, print_json

app = typer.Typer(rich_markup_mode=None)
log_app = typer.Typer(help="Look at what people did at a site.", no_args_is_help=True, rich_markup_mode=None)
policy_app = typer.Typer(help="Look at what a site allows.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(log_app, name="audit-log")
app.add_typer(policy_app, name="policy")

LogPath = Annotated[Path, typer.Argument(metavar="PATH", help="An audit log.")]
PublicKey = Annotated[str | None, typer.Option(help="The site's; default the one that the first entry states.")]


@log_app.command("verify", epilog="Example: dpfl audit-log verify site/audit.jsonl")
def log_verify(
    path: LogPath,
    public_key: PublicKey = None,
    head: Annotated[
        str | None, typer.Option(help="A hash that this command printed before: nothing up to it may be gone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every entry's place, hash and signature; names the first bad one."""
    from dp_federated_lora.errors import AuditLogCorrupt  # noqa: PLC0415
    from dp_federated_lora.network.audit_log import verify  # noqa: PLC0415

    trail = verify(path, public_key)
    if head is not None and not trail.contains(head):
        raise AuditLogCorrupt(f"{path} lacks the entry {head}, which it had before: it was cut or replaced")
    facts = {"entries": len(trail.entries), "head": trail.head, "public_key": trail.public_key, "torn_bytes": trail.torn}
    if as_json:
        print_json(facts)
        return
    torn = f"; {trail.torn} bytes of an unfinished last line, as a crash leaves them, do not count" if trail.torn else ""
    typer.echo(f"intact: {len(trail.entries)} entries, head {trail.head}, key {trail.public_key}{torn}")


@log_app.command("show", epilog="Example: dpfl audit-log show site/audit.jsonl")
def log_show(path: LogPath, public_key: PublicKey = None, as_json: AsJson = False) -> None:
    """Print every entry, once the log is verified."""
    from dp_federated_lora.network.audit_log import verify  # noqa: PLC0415

    entries = verify(path, public_key).entries
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    table = Table(title=f"Audit log {path}", title_justify="left")
    for name in ("number", "time", "actor", "act", "facts"):
        table.add_column(name, overflow="fold", no_wrap=name == "time")  # nothing is cut off, however narrow the screen
    for entry in entries:
        facts = ", ".join(f"{name} {value}" for name, value in entry.facts.items())
        table.add_row(str(entry.number), entry.time, entry.actor, entry.act, facts)
    Console().print(table)


@policy_app.command("check", epilog="Example: dpfl policy check policy.toml newswire.toml")
def policy_check(
    policy: Annotated[Path, typer.Argument(metavar="POLICY", help="A site's policy.toml.")],
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration file.")],
    submitter: Annotated[str | None, typer.Option(help="Who submits it; default the first who may.")] = None,
    data_set: Annotated[
        str | None, typer.Option(help="On which data set; default that of [ledger], else the policy's first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the site would answer to a configuration; exit code 1 with every reason if it refuses."""
    from dp_federated_lora.data import resolve  # noqa: PLC0415
    from dp_federated_lora.lab import load_config  # noqa: PLC0415
    from dp_federated_lora.network.offer import Offer, model_id  # noqa: PLC0415
    from dp_federated_lora.network.policy import SitePolicy  # noqa: PLC0415

    rules, settings = SitePolicy.load(policy), load_config(config)
    known = [settings.ledger.data_set] if settings.ledger else [each.name for each in rules.data_set]
    offer = Offer.of(
        settings,
        model=model_id(resolve(settings.model.source, sha256=settings.model.sha256)),
        submitter=submitter or next(iter(rules.people.submit), "nobody"),
        data_set=data_set or next(iter(known), "none"),
    )
    found = rules.refusals(offer)
    facts = {"submitter": offer.submitter, "data_set": offer.data_set, "model": offer.model}
    if as_json:
        print_json({"accepted": not found, **facts, "refusals": [asdict(refusal) for refusal in found]})
    elif found:
        typer.echo("\n".join(["refused:", *(f"  {refusal}" for refusal in found)]))
    else:
        typer.echo(f'accepted: submitted by "{offer.submitter}", on "{offer.data_set}" for {" and ".join(offer.purposes)}')
    raise typer.Exit(1 if found else 0)
