"""A run from start or from where it stopped, to its files."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import BudgetExhausted, CheckpointError, ConfigError, RunInterrupted, SecureSumAborted
from dp_federated_lora.federated import (
    ClientMemory,
    Exchange,
    Purpose,
    RoundKeyFile,
    RoundReport,
    Server,
    read_checkpoint,
    write_checkpoint,
)
from dp_federated_lora.files import write_durably
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.ledgers import LifetimeBudgets
from dp_federated_lora.lab.personal import SHARED_PART
from dp_federated_lora.lab.planning import participation_in_words, participation_json
from dp_federated_lora.lab.plans import participant_tiers, privacy_plan
from dp_federated_lora.lab.statement import statement_at, statement_json
from dp_federated_lora.lab.stopping import reason_to_stop
from dp_federated_lora.lab.workbench import Workbench, data_id, defence_in_words
from dp_federated_lora.monitoring.log import open_log
from dp_federated_lora.monitoring.metrics import MetricsFile, read_metrics
from dp_federated_lora.monitoring.report import TRAINED_SHARE, AuditFigures, render_report
from dp_federated_lora.monitoring.statement import StatementRow
from dp_federated_lora.privacy import DpEvent, Ledger, PrivacyPlan, SecureRandom, Spend, Trust
from dp_federated_lora.training import evaluate_model

OWNER: Final = "all participants of this run"

ABORTED_IN_A_ROW: Final = 3
"""Secure sums after which a run ends: what hinders them stays, and each costs a charge."""

NOISE_ADDED_BY: Final = {
    Trust.CENTRAL: "the server",
    Trust.LOCAL: "each of {:,} participants",
    Trust.DISTRIBUTED: "{:,} participants, in shares under secure aggregation",
}

OnRound = Callable[[RoundReport], None]
OnPhase = Callable[[str, float], None]
Instrument = Callable[[Exchange, Server], tuple[Exchange, Server]]
"""Wraps what a round goes through, for audits."""


@final
@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run came to.

    Args:
        path: the run directory.
        epsilon: claimed, of the whole plan however early the run ended.
        delta: at which it holds.
        rounds: published rounds.
        metrics: quality on declared-public test data; empty where none is configured.
        statement: the privacy statement.
        stopped: why the run ended before its last round; None if it did not.
    """

    path: Path
    epsilon: float
    delta: float
    rounds: int
    metrics: dict[str, float]
    statement: tuple[StatementRow, ...]
    stopped: str | None


def train(
    config: Config | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    on_round: OnRound | None = None,
    on_phase: OnPhase | None = None,
) -> TrainResult:
    """Run a configuration to the end, or continue an interrupted run.

    Args:
        config: a new run's configuration; left out with `resume`.
        out: the new run directory; default `[run] out`.
        resume: directory of the run to continue.
        on_round: called with every round's public report.
        on_phase: called during work outside of rounds with its name and the share of it that is done.

    Raises:
        ConfigError: if not exactly one of `config` and `resume` is given.
        RunError: if the directory exists (new run), is no run (resume), or is in use.
        BudgetExhausted: if not even the first round fits the budgets.
        RunInterrupted: on SIGINT or SIGTERM, after the round under way; the run can be resumed.
    """
    if (config is None) == (resume is None):
        raise ConfigError("give either a configuration to start or a run directory to resume, not both")
    if config is not None:
        run = RunDirectory.create(Path(out or config.run.out), config)
    else:
        run = RunDirectory.existing(Path(resume or ""))
    with run:
        work = Run(run, on_round=on_round, on_phase=on_phase)
        work.train()
        return work.write_results()


@final
class Run:
    """One run in one process: everything that its rounds share.

    Args:
        directory: of the run, locked.
        on_round: as `train`.
        on_phase: as `train`.
        instrument: wraps the engine and the server before the first round.
        exchange: of participants elsewhere; left out, all are simulated here.
        bench: the configuration's model at its start, where it is loaded already.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        on_round: OnRound | None = None,
        on_phase: OnPhase | None = None,
        instrument: Instrument = lambda exchange, server: (exchange, server),
        exchange: Exchange | None = None,
        bench: Workbench | None = None,
    ) -> None:
        self._directory = directory
        self._config = config = directory.load_config()
        self._on_round: OnRound = on_round or (lambda _: None)
        self._on_phase: OnPhase = on_phase or (lambda *_: None)
        self._log = open_log(directory.log, run=directory.path.name)
        self._metrics = MetricsFile(directory.metrics)
        self._keys = RoundKeyFile(directory.round_key)
        self._plan: PrivacyPlan = privacy_plan(config)
        self._bench = bench or Workbench.of(config)
        self._memory = ClientMemory(directory.clients)
        clients = [] if exchange else self._bench.clients(self._plan, self._memory)
        self._keepers = [client.name for client in clients if client.keeps_state]
        identity = f"{config.content_id}{self._plan.content_id}{data_id(clients)}"  # another library may plan otherwise
        self._run_id = hashlib.sha256(identity.encode()).hexdigest()
        self._probe = self._bench.test_examples(limit=config.run.evaluate_examples)
        sets = [examples for client in clients for examples in (client.examples, client.held_out)]
        self._prepare(sets if self._probe is None else [*sets, self._probe])
        server, self._state = self._bench.server(self._plan)
        exchange = exchange or self._bench.simulator(clients)
        self._exchange, self._server = instrument(exchange, server)
        self._ledger = Ledger.open(directory.ledger, budget=self._plan.budget, owner=OWNER)
        self._lifetime = LifetimeBudgets.open(config)
        self._stopped: str | None = None
        self._aborted = 0
        self._reports: list[RoundReport] = []
        self._recover()

    def _prepare(self, sets: list[Examples]) -> None:
        if self._bench.prepare(self._plan, *sets, on_progress=partial(self._on_phase, "preparing examples")):
            self._on_phase("preparing examples", 1.0)

    def _recover(self) -> None:
        """Take up the last durable checkpoint, and publish it in the ledger if a crash came in between."""
        self._lifetime.check(self._ledger)
        checkpoint, pending = self._directory.checkpoint, self._ledger.pending()
        published = sum(row.kind == "commit" and row.facts["purpose"] == Purpose.TRAINING.value for row in self._ledger.rows())
        if checkpoint.exists():
            self._state, head = read_checkpoint(checkpoint, run_id=self._run_id)
            if not self._ledger.contains(head):
                raise CheckpointError(
                    f"{self._directory.ledger} is older than the checkpoint: charges are missing from it. Restore the newest "
                    "ledger; a run never continues on a smaller spend"
                )
        elif published:
            raise CheckpointError(
                f"{checkpoint} is missing but the ledger has published rounds: restore the state folder, or start a new run"
            )
        if published > self._state.round:
            raise CheckpointError(
                f"{checkpoint} is of round {self._state.round}, the ledger has published {published}: "
                "restore the newest checkpoint; a published round is never released again"
            )
        if pending is not None and pending.round <= self._state.round:
            if pending.facts["purpose"] == Purpose.TRAINING.value:  # an interrupted evaluation is lost; its charge stays
                self._ledger.commit(pending.serial)
            self._keys.destroy()
        self._memory.rewind(self._keepers, self._state.round)
        self._metrics.truncate_after(self._state.round)
        if self._directory.metrics.exists():
            self._reports = [RoundReport(**line) for line in read_metrics(self._directory.metrics)]
        self._log.info("run opened", round=self._state.round, epsilon=self._ledger.spent().epsilon)

    def train(self) -> None:
        """Run the rounds that are left.

        Raises:
            RunInterrupted: on SIGINT or SIGTERM, after the round under way.
            SecureSumAborted: if several secure sums in a row were aborted; the run can be resumed.
        """
        in_a_row = 0
        with _stop_signals() as stop:
            while self._state.round < self._plan.rounds:
                if stop:
                    self._log.warning("interrupted", round=self._state.round)
                    raise RunInterrupted(
                        f"stopped after round {self._state.round} of {self._plan.rounds}; continue with "
                        f"`dpfl train --resume {self._directory.path}`"
                    )
                if reason := reason_to_stop(self._config, self._reports):
                    self._stopped = reason
                    self._log.info("stopped early", reason=reason)
                    break
                try:
                    self._round()
                    in_a_row = 0
                except SecureSumAborted as error:  # its charge stays, and the round is begun anew with another
                    self._keys.destroy()
                    self._aborted += 1
                    in_a_row += 1
                    self._log.warning("secure sum aborted", round=self._state.round + 1, reason=str(error))
                    if in_a_row == ABORTED_IN_A_ROW:
                        raise SecureSumAborted(
                            f"{in_a_row} secure sums in a row were aborted, each of them charged: {error}"
                        ) from error
                except BudgetExhausted as error:
                    if self._state.round == 0:
                        raise  # nothing was released: there is no result to write
                    self._stopped = str(error)
                    self._log.warning("budget exhausted", reason=self._stopped)
                    break

    @property
    def published(self) -> int:
        """Rounds whose adapter is published."""
        return self._state.round

    def spent(self) -> Spend:
        """What the ledger has charged."""
        return self._ledger.spent()

    def _round(self) -> None:
        number = self._state.round + 1
        key = self._keys.open_round(number, insecure_seed=self._config.run.insecure_seed, attempt=self._aborted)
        by_tier = [self._plan.event_of(tier) for tier in self._plan.tiers] or [self._plan.event_in(number)]
        events = [by_tier[tier] for tier in participant_tiers(self._config)]
        self._charge_lifetimes(events, Purpose.TRAINING, number, key)
        permit = self._server.reserve(self._state, self._ledger, key)
        clip_norm = self._state.clip_norm
        self._state, update_norm = self._server.run_round(self._state, permit, self._exchange, key)
        write_checkpoint(self._directory.checkpoint, self._state, run_id=self._run_id, ledger_head=self._ledger.head)
        self._ledger.commit(permit.serial)
        scores = self._private_scores(key)
        self._keys.destroy()
        report = self._server.report(self._state, self._ledger, update_norm=update_norm, clip_norm=clip_norm, scores=scores)
        if self._probe is not None and self._state.round % self._config.run.evaluate_every == 0:
            self._bench.model.load(self._state.adapter)
            report = report.with_metrics(evaluate_model(self._bench.learner, self._probe))
        self._metrics.append(report)
        self._reports.append(report)
        self._log.info("round", report=report)
        self._on_round(report)

    def _private_scores(self, key: SecureRandom) -> dict[str, float]:
        """Charged scores on participants' held-out data, where they are due after this round."""
        evaluation, number = self._plan.evaluation, self._state.round
        if evaluation is None or not evaluation.due(number):
            return {}
        key = key.derive(Purpose.EVALUATION.value)
        self._charge_lifetimes([evaluation.event] * self._config.federation.clients, Purpose.EVALUATION, number, key)
        permit = self._ledger.reserve(evaluation.event, round=number, purpose=Purpose.EVALUATION.value, commitment=key.commitment)
        scores = self._server.evaluate(self._state, evaluation, permit, self._exchange, key)
        self._ledger.commit(permit.serial)
        return scores

    def _charge_lifetimes(self, events: Sequence[DpEvent], purpose: Purpose, number: int, key: SecureRandom) -> None:
        self._lifetime.charge(events, number=number, purpose=purpose.value, run=self._ledger, commitment=key.commitment)

    def write_results(self) -> TrainResult:
        """Score the adapter and write the files of a finished run."""
        directory, config, spend = self._directory, self._config, self._ledger.spent()
        statement = statement_at(config, self._plan, spend)
        self._on_phase("scoring the test data", 0)
        self._bench.model.load(self._state.adapter)
        test = self._bench.test_examples()
        metrics = {} if test is None else evaluate_model(self._bench.learner, test)
        directory.adapter.mkdir(exist_ok=True)
        self._bench.model.save(directory.adapter, source=config.model.source, note=SHARED_PART if self._bench.method.kept else "")
        privacy: dict[str, Any] = {
            "statement": statement_json(statement),
            "insecure_seed": config.run.insecure_seed,
            "charges": spend.charges,
            "epsilon_charged": spend.epsilon,
            "published_rounds": self._state.round,
            "planned_rounds": self._plan.rounds,
            "stopped": self._stopped,
            "trust": self._plan.trust.value,
            "noise_multiplier": self._plan.mechanism.noise_multiplier,
            "noise_sources": self._plan.sites,
            "groups": self._server.defence.groups,
            "sampling_rate": self._plan.sampler.sampling_rate,
            **participation_json(self._plan),
            "clip_norm": self._plan.clip_norm,
            "plan": self._plan.content_id,
            "ledger_head": self._ledger.head,
        }
        write_durably(directory.privacy, (json.dumps(privacy, indent=2) + "\n").encode())
        write_durably(directory.report, self._render(statement, metrics).encode())
        claimed = self._plan.claimed(spend)
        self._log.info("run finished", epsilon=claimed, metrics=metrics)
        return TrainResult(directory.path, claimed, spend.delta, self._state.round, metrics, statement, self._stopped)

    def _render(self, statement: tuple[StatementRow, ...], metrics: dict[str, float]) -> str:
        config, plan = self._config, self._plan
        return render_report(
            title=self._directory.path.name,
            config_toml=config.to_toml(),
            reports=self._reports,
            statement=statement,
            budget_epsilon=plan.budget.epsilon,
            facts={
                "Base model": config.model.source,
                "Trained parameters": f"{self._server.layout.size:,}",
                TRAINED_SHARE: f"{self._bench.trainable_fraction:.3%}",
                "Method": config.method.name,
                "Participants": f"{config.federation.clients:,} ({config.federation.partition})",
                **({"Delay of participants": f"0 to {delay} server steps"} if (delay := config.federation.max_staleness) else {}),
                "Noise multiplier": f"{plan.mechanism.noise_multiplier:.4f}",
                "Noise added by": NOISE_ADDED_BY[plan.trust].format(plan.sites),
                **({"Against liars": defence_in_words(config)} if config.robust else {}),
                "Sampling rate": f"{plan.sampler.sampling_rate:g}",
                "Clip norm": f"{plan.clip_norm:g}",
                "Rounds of a unit": participation_in_words(plan),
                "Rounds": f"{self._state.round} of {plan.rounds}",
                **({"Ended early": self._stopped} if self._stopped else {}),
                "Bytes per participant and round": f"{self._server.bytes_per_client(plan.rounds):,}",
            },
            final_metrics=metrics,
            insecure=config.run.insecure_seed is not None,
            audit=self._audit_figures(),
        )

    def _audit_figures(self) -> AuditFigures | None:
        """What an audit of this run found, where there was one."""
        if not self._directory.audit.exists():
            return None
        found = json.loads(self._directory.audit.read_text(encoding="utf-8"))
        return AuditFigures(
            claimed=found["claimed_epsilon"],
            lower_bound=found["lower_bound"],
            confidence=found["confidence"],
            canaries=found["canaries"],
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its signals are somebody else's
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
