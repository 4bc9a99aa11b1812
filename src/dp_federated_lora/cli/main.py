"""Words in, words out: every command calls one function of `lab` and prints what came back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dp_federated_lora.cli import accounts, audit_log, bench, network
from dp_federated_lora.cli.terminal import AsJson, RunPath, print_json, show
from dp_federated_lora.errors import DpflError, RunInterrupted

NOISE_PRICE = {"local": "that of trust = central", "distributed": "what is counted on, if nobody drops out or colludes"}

app = typer.Typer(
    help="Federated LoRA fine-tuning with differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(accounts.app)
app.add_typer(audit_log.app)
app.add_typer(network.app)
app.add_typer(bench.app, name="bench")

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; repeatable.")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration file.")]


@app.command(epilog="Example: dpfl recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the ready configurations."""
    from dp_federated_lora.lab.recipes import recipe_names  # noqa: PLC0415

    names = recipe_names()
    print_json(names) if as_json else show("Recipes", names)


@app.command(epilog="Example: dpfl init newswire newswire.toml")
def init(
    recipe: Annotated[str, typer.Argument(help="A name that `dpfl recipes` lists.")],
    path: Annotated[Path | None, typer.Argument(help="Where to; default RECIPE.toml.")] = None,
) -> None:
    """Write a commented configuration to start from."""
    from dp_federated_lora.errors import RunError  # noqa: PLC0415
    from dp_federated_lora.lab.recipes import recipe_text  # noqa: PLC0415

    text, target = recipe_text(recipe), path or Path(f"{recipe}.toml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunError(f"{target} exists; name another file") from error
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}") from error
    typer.echo(f"Wrote {target}. Next: dpfl plan {target}")


@app.command(epilog="Example: dpfl plan newswire.toml --set privacy.epsilon=3")
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would do, cost and promise; nothing is trained."""
    from dp_federated_lora.lab import load_config, plan_run  # noqa: PLC0415
    from dp_federated_lora.lab.planning import participation_in_words  # noqa: PLC0415
    from dp_federated_lora.monitoring.statement import statement_in_words  # noqa: PLC0415

    settings = load_config(config, overrides=overrides or ())
    result = plan_run(settings)
    facts = result.as_json()
    if as_json:
        print_json(facts)
        return
    show(
        f"Plan of {config}",
        {
            "noise multiplier": f"{facts['noise_multiplier']:.4f}",
            "rounds": f"{facts['steps']}",
            "sampling rate": f"{facts['sampling_rate']:g}",
            "rounds of a unit": participation_in_words(result.privacy),
            "expected cohort": f"{facts['expected_cohort']:g} {result.privacy.unit.value}s a round",
            "noise in a round's mean": f"norm {facts['noise_norm']:.4g}, beside a signal of at most {facts['clip_norm']:g}"
            + (f"; {facts['noise_price']:.4g} times {NOISE_PRICE[facts['trust']]}" if facts["noise_price"] > 1 else "")
            + (
                f"; {facts['groups'] ** 0.5:.4g} times that of one sum, for {facts['groups']} groups"
                if facts["groups"] > 1
                else ""
            )
            + (f"; stale contributions weigh {facts['mean_weight']:.3g} on average" if facts["mean_weight"] < 1 else ""),
            "trained parameters": f"{facts['trainable_parameters']:,} ({facts['trainable_fraction']:.3%} of the model)",
            "bytes per participant and round": f"{facts['bytes_per_client_round']:,}",
        },
    )
    typer.echo(statement_in_words(result.statement, insecure=settings.run.insecure_seed is not None))


@app.command(epilog="Example: dpfl train newswire.toml --out runs/first   or   dpfl train --resume runs/first")
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A configuration file.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new run directory.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    insecure_seed: Annotated[
        int | None, typer.Option(help="Noise from this seed, to repeat a run in tests: NOT PRIVATE.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, and write the run directory."""
    from dp_federated_lora.errors import ConfigError  # noqa: PLC0415
    from dp_federated_lora.lab import load_config  # noqa: PLC0415
    from dp_federated_lora.lab import train as train_run  # noqa: PLC0415
    from dp_federated_lora.lab.statement import statement_json  # noqa: PLC0415
    from dp_federated_lora.monitoring.progress import ProgressBoard  # noqa: PLC0415
    from dp_federated_lora.monitoring.statement import statement_in_words  # noqa: PLC0415

    if (config is None) == (resume is None):
        raise ConfigError("give a CONFIG to start a run, or --resume RUN to continue one")
    if resume is not None and (out or overrides or insecure_seed is not None):
        raise ConfigError("--resume continues a run exactly as it was started; --out, --set and --insecure-seed do not apply")
    seeded = [] if insecure_seed is None else [f"run.insecure_seed={insecure_seed}"]
    settings = load_config(config or (resume or Path()) / "config.toml", overrides=[*(overrides or ()), *seeded])
    with ProgressBoard(budget_epsilon=settings.privacy.epsilon) as board:
        result = train_run(None if resume else settings, out=out, resume=resume, on_round=board.update, on_phase=board.show_phase)
    if as_json:
        print_json(
            {
                "run": str(result.path),
                "rounds": result.rounds,
                "epsilon": result.epsilon,
                "delta": result.delta,
                "stopped": result.stopped,
                "metrics": result.metrics,
                "statement": statement_json(result.statement),
            }
        )
        return
    show(
        f"Finished: {result.path}",
        {
            "rounds": str(result.rounds),
            **({"stopped": result.stopped} if result.stopped else {}),
            "epsilon": f"{result.epsilon:.4f} at delta {result.delta:g}",
            **{name: f"{value:.4f}" for name, value in result.metrics.items()},
            "report": str(result.path / "report.html"),
            "adapter": str(result.path / "adapter"),
        },
    )
    typer.echo(statement_in_words(result.statement, insecure=settings.run.insecure_seed is not None))


@app.command(epilog="Example: dpfl evaluate runs/first --json")
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option(help="Source of a public or declared-non-private table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a run on public test data."""
    from dp_federated_lora.lab import evaluate as evaluate_run  # noqa: PLC0415

    metrics = evaluate_run(run, data=data)
    print_json(metrics) if as_json else show(f"{run}", {k: f"{v:.4f}" for k, v in metrics.items()})


@app.command(epilog="Example: dpfl personal runs/first client-07 my-adapter")
def personal(
    run: RunPath,
    client: Annotated[str, typer.Argument(help="Name of the participant.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
) -> None:
    """Write one participant's own adapter (method fedsa): for that participant alone, nothing protects it."""
    from dp_federated_lora.lab.personal import personal_adapter  # noqa: PLC0415

    typer.echo(f"Wrote {personal_adapter(run, client, out)}. NOT PRIVATE: its B has no noise and must not leave {client}.")


@app.command(epilog="Example: dpfl audit newswire.toml --canaries 1000   or   dpfl audit runs/first")
def audit(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A configuration file, or a run to take it from.")],
    out: Annotated[Path | None, typer.Option(help="The new run directory; default runs/audit-NAME.")] = None,
    canaries: Annotated[int, typer.Option(help="Known contributions; half of them take part.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    as_json: AsJson = False,
) -> None:
    """Train with canaries in a new directory; exit code 1 if they show more than the claimed epsilon."""
    from dp_federated_lora.lab.auditing import audit as audit_run  # noqa: PLC0415
    from dp_federated_lora.lab.auditing import audit_directory, audited_config  # noqa: PLC0415
    from dp_federated_lora.monitoring.progress import ProgressBoard  # noqa: PLC0415

    settings, where = audited_config(target), out or audit_directory(target)
    with ProgressBoard(budget_epsilon=settings.privacy.epsilon) as board:
        result = audit_run(
            settings, out=where, canaries=canaries, confidence=confidence, on_round=board.update, on_phase=board.show_phase
        )
    found = result.verdict
    if as_json:
        print_json({"run": str(result.path), **found.as_json()})
    else:
        guesses, estimate = found.guesses, found.estimate
        show(
            f"Audit: {result.path}",
            {
                "claimed epsilon": f"{found.claimed:.4f} at delta {found.delta:g}",
                f"lower bound ({confidence:.4g})": f"{found.lower_bound:.4f}",
                "bound, one run, any mechanism": f"{found.one_run:.4f}",
                "bound, one run, this mechanism": f"{found.f_dp:.4f}",
                "estimate (no bound)": f"{estimate.epsilon:.4f}, at least {estimate.low:.4f}" if estimate else "none",
                "canaries": f"{guesses.canaries:,}: {guesses.correct} of {guesses.guesses} guesses correct",
                "verdict": "PASS" if found.passed else "FAIL: more was shown than is claimed",
            },
        )
    raise typer.Exit(0 if found.passed else 1)


def main() -> None:
    """Entry point: errors become one message and an exit code (130 when interrupted, 2 otherwise)."""
    try:
        app()
    except DpflError as error:
        typer.echo(f"dpfl: {type(error).__name__}: {error}", err=True)
        sys.exit(130 if isinstance(error, RunInterrupted) else 2)


if __name__ == "__main__":
    main()
