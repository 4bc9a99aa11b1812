"""The program that runs what administrators submit: it asks sites, forms secure sums, and goes on where it was when it died."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final, get_args

from dp_federated_lora.data import resolve
from dp_federated_lora.errors import DpflError, MessageRefused, PolicyRefused, RunError, RunInterrupted
from dp_federated_lora.files import FolderLock
from dp_federated_lora.lab.config import Config, parse_config_text
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import Run
from dp_federated_lora.lora import preload
from dp_federated_lora.monitoring.log import open_log
from dp_federated_lora.monitoring.metrics import read_metrics
from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics
from dp_federated_lora.network.administration import Order, answer_to, read_order
from dp_federated_lora.network.audit_log import AuditLog
from dp_federated_lora.network.connection import Connection, Inbox
from dp_federated_lora.network.exchange import SiteExchange
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.messages import VERSION, Ended, Joined, Offered, Refused, encode, from_site
from dp_federated_lora.network.offer import model_id
from dp_federated_lora.network.parts import Assembly
from dp_federated_lora.network.project import Member
from dp_federated_lora.network.runs import UNFINISHED, RunRecord, RunTable, State
from dp_federated_lora.network.site_run import software, unfit_for_sites
from dp_federated_lora.network.subjects import FROM_ADMINISTRATORS, VERBS, inbox_of, outbox_of
from dp_federated_lora.network.submissions import require_submission

_OFFER_AGAIN: Final = 5.0
_REMEMBERED: Final = 100


@final
class Coordinator:
    """Runs, one after the other, for the sites of a kit.

    Args:
        kit: of the coordinator.
        folder: where run directories are kept; coordinators that stand by for one another share it.
        database: of the runs: a file, or `postgresql://user@host/database`; default a file in the folder.
        deadline: seconds for one step of a secure sum.
        patience: seconds to wait for sites to join.
        standby: wait while another coordinator works with the folder, and go on where it was when it dies.
        metrics: of this program alone; default new ones, which nobody looks at.

    Raises:
        RunError: if another one does, without standing by.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        folder: Path,
        database: str | None = None,
        deadline: float = 120.0,
        patience: float = 600.0,
        standby: bool = False,
        metrics: CoordinatorMetrics | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if standby:
            preload()
        self._lock = FolderLock(folder, wait=standby)
        self.kit, self._folder, self._deadline, self._patience = kit, folder, deadline, patience
        self.table = RunTable(database or folder / "runs.sqlite")
        self.metrics = metrics or CoordinatorMetrics()
        self.metrics.runs_in(get_args(State), lambda: [record.state for record in self.table.all()])
        self._audit = AuditLog.open(folder / "audit.jsonl")
        self._log = open_log(folder / "coordinator.log", run="")
        self._from_sites: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._heard: dict[str, float] = {}
        self._answers: dict[tuple[str, str, str], bytes] = {}  # to administrators
        self._send: Callable[[str, bytes], None] = lambda *_: None
        self._work = threading.Condition()
        self._closing = self._stopping = False
        self._running = ""

    # --- the link to sites: called from the thread of a run ---------------------------------------------

    def send(self, site: str, data: bytes) -> None:
        """Send to a site."""
        self.metrics.sent(len(data))
        self._send(inbox_of(Member("site", site)), data)

    def receive(self, timeout: float) -> tuple[str, bytes] | None:
        """The next message of any site; as `Link`."""
        if self._closing:
            raise RunInterrupted("the coordinator is closing; it goes on with the run when it is started again")
        if self._stopping:
            raise RunInterrupted("an administrator stopped the run")
        try:
            return self._from_sites.get(timeout=min(timeout, 1.0))
        except queue.Empty:
            return None

    def heard(self, site: str, data: bytes) -> None:
        """Take in a whole message of a site."""
        self.metrics.received(len(data))
        self._heard[site] = time.monotonic()
        if self._running:
            self._from_sites.put((site, data))

    # --- runs -------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Run what was submitted, one run after the other, until `close`."""
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or self._next() is not None)
                record = None if self._closing else self._next()
            if record is None:
                self._lock.release()
                return
            self._run(record)

    def close(self) -> None:
        """End `work` after the step under way; what is unfinished goes on at the next start."""
        with self._work:
            self._closing = True
            self._work.notify_all()

    def _next(self) -> RunRecord | None:
        return next((record for record in self.table.all() if record.state in UNFINISHED), None)

    def _run(self, record: RunRecord) -> None:
        self._running, self._stopping = record.run, bool(record.stop)
        while not self._from_sites.empty():
            self._from_sites.get_nowait()
        try:
            reason = self._train(record)
            state = "stopped" if self._stopping else "finished"
        except RunInterrupted as error:
            if not self._stopping:
                return  # closing: it goes on at the next start
            state, reason = "stopped", str(error)
        except DpflError as error:
            state, reason = "failed", str(error)
        except Exception as error:
            state, reason = "failed", f"a defect of this software: {type(error).__name__}; see coordinator.log"
            self._log.error("defect", kind=type(error).__name__, of=record.run, reason=str(error))
        finally:
            self._running = ""
            self.metrics.run_over(record.run)
        self.table.set(record.run, state=state, reason=reason)
        self._audit.append("coordinator", f"a run {state}", {"run": record.run, "reason": reason})
        self._log.info("run over", of=record.run, state=state, reason=reason)
        for site in self.kit.roster:
            self.send(site, encode(Ended(VERSION, record.run, reason or state)))

    def _train(self, record: RunRecord) -> str:
        config = parse_config_text(record.config, where=f"the configuration of run {record.run}")
        names = tuple(sorted(self.kit.roster))
        if len(names) != config.federation.clients:
            raise RunError(f"{len(names)} sites have joined the project, federation.clients says {config.federation.clients}")
        self.table.set(record.run, state="joining")
        model = model_id(resolve(config.model.source, sha256=config.model.sha256))
        offer = (software(), record.config, model, record.submitter, record.signature, names)
        self._join(names, encode(Offered(VERSION, record.run, *offer)))
        self.table.set(record.run, state="running", reason="")
        path = self._folder / "runs" / record.run
        directory = RunDirectory.existing(path) if (path / "config.toml").exists() else RunDirectory.create(path, config)
        with directory:
            plan = privacy_plan(config)
            exchange = SiteExchange(
                record.run,
                names,
                plan,
                roster=self.kit.roster,
                link=self,
                folder=directory.checkpoint.parent / "sums",
                deadline=self._deadline,
                patience=self._patience,
                log=open_log(directory.log, run=record.run),
                metrics=self.metrics,
            )
            limit = plan.budget.epsilon
            run = Run(
                directory,
                exchange=exchange,
                on_round=lambda report: self.metrics.round_released(record.run, report.epsilon, limit),
            )
            self.metrics.run_spent(record.run, run.spent().epsilon, limit)
            try:
                run.train()
            except RunInterrupted:
                if not self._stopping or not run.published:
                    raise
            return run.write_results().stopped or ""

    def _join(self, names: tuple[str, ...], offered: bytes) -> None:
        """Offer a run until all sites have joined.

        Raises:
            PolicyRefused: if one refuses, with its reasons.
            RunError: if one does not answer in time.
        """
        missing, again = set(names), 0.0
        end = time.monotonic() + self._patience
        while missing:
            if (now := time.monotonic()) > end:
                silent = ", ".join(sorted(missing))
                raise RunError(f"{silent} did not answer within {self._patience:g} seconds: start them, and submit the run anew")
            if now >= again:
                for site in missing:
                    self.send(site, offered)
                again = now + _OFFER_AGAIN
            received = self.receive(again - now)
            if received is None or received[0] not in missing:
                continue
            site, data = received
            try:
                message = from_site(data)
            except MessageRefused as error:
                self._log.warning("a message was refused", site=site, reason=str(error))
                self.metrics.refused("answer")
                continue
            if isinstance(message, Refused) and message.run == self._running:
                self.metrics.refused("run")
                self._audit.append(f"site {site}", "refused a run", {"run": message.run, "reason": "; ".join(message.reasons)})
                raise PolicyRefused(f"site {site} does not take part: " + "; ".join(message.reasons))
            if isinstance(message, Joined) and message.run == self._running:
                missing.discard(site)

    # --- administrators ---------------------------------------------------------------------------------

    def obey(self, person: str, verb: str, data: bytes) -> bytes:
        """The answer to an administrator, whose rights the broker has checked by the verb."""
        try:
            order = read_order(data)
        except MessageRefused as error:
            return answer_to(Order("", ""), error=str(error))
        if verb in VERBS["view"]:
            return self._answered(person, verb, order)
        asked = (person, verb, order.question)
        if asked in self._answers:  # again, as an answer may be lost: what was done is not done twice
            return self._answers[asked]
        while len(self._answers) >= _REMEMBERED:
            del self._answers[next(iter(self._answers))]
        self._answers[asked] = answer = self._answered(person, verb, order)
        return answer

    def _answered(self, person: str, verb: str, order: Order) -> bytes:
        try:
            return answer_to(order, result=self._done(person, verb, order))
        except DpflError as error:
            self.metrics.refused("order")
            self._audit.append(f"administrator {person}", f"was refused: {verb}", {"run": order.run, "reason": str(error)})
            return answer_to(order, error=str(error))

    def _done(self, person: str, verb: str, order: Order) -> Any:
        match verb:
            case "submit":
                return self._submit(person, order)
            case "stop":
                return self._stop(person, order.run)
        return self._view(verb, order.run)

    def _view(self, verb: str, run: str) -> Any:
        match verb:
            case "runs":
                return [self._facts(record, self._rounds(record.run)) for record in self.table.all()]
            case "status":
                rounds = self._rounds(run)
                return self._facts(self.table.get(run), rounds) | {"rounds": rounds}
            case "results":
                return self._results(self.table.get(run))
            case "sites":
                now = time.monotonic()
                return [
                    {"site": name, "heard_seconds_ago": round(now - self._heard[name], 1) if name in self._heard else None}
                    for name in sorted(self.kit.roster)
                ]
        raise MessageRefused(f"there is no {verb!r} here")

    def _stop(self, person: str, run: str) -> Mapping[str, str]:
        record = self.table.get(run)
        if record.stop != person:
            if record.state not in UNFINISHED:
                raise RunError(f"run {run} is over ({record.state}): there is nothing to stop")
            self.table.set(run, stop=person)
            self._stopping = self._stopping or run == self._running
            self._audit.append(f"administrator {person}", "stopped a run", {"run": run})
        return {"run": run, "state": "stopping"}

    def _submit(self, person: str, order: Order) -> Mapping[str, str]:
        require_submission(
            self.kit.administrators,
            submitter=person,
            project=self.kit.project,
            run=order.run,
            config=order.config,
            signature=order.signature,
        )
        require_networked(parse_config_text(order.config, where="the configuration"))
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._work:
            self.table.add(RunRecord(order.run, person, order.config, order.signature, now))
            self._work.notify_all()
        self._audit.append(f"administrator {person}", "submitted a run", {"run": order.run})
        return {"run": order.run, "state": self.table.get(order.run).state}

    def _results(self, record: RunRecord) -> Mapping[str, str]:
        """Released files by name, base64."""
        if record.state in UNFINISHED:
            raise RunError(f"run {record.run} is {record.state}: its results are there once it is over")
        directory = RunDirectory(self._folder / "runs" / record.run)
        if not directory.report.exists():
            raise RunError(f"run {record.run} has no results: it {record.state} ({record.reason})")
        return {name: b64encode(path.read_bytes()).decode() for name, path in directory.released.items()}

    def _facts(self, record: RunRecord, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "run": record.run,
            "state": record.state,
            "reason": record.reason,
            "submitter": record.submitter,
            "submitted": record.submitted,
            "round": len(rounds),
            "epsilon": rounds[-1]["epsilon"] if rounds else 0.0,
        }

    def _rounds(self, run: str) -> list[dict[str, Any]]:
        """Public reports of a run's rounds so far."""
        file = RunDirectory(self._folder / "runs" / run).metrics
        if not file.exists():
            return []
        return [{name: value for name, value in row.items() if name != "bytes_per_client"} for row in read_metrics(file)]


def require_networked(config: Config) -> None:
    """Check that a configuration can be run over a network.

    Raises:
        RunError: if sites could not take part in it.
        IncompatiblePlan: if it has no plan.
    """
    if reasons := unfit_for_sites(config):
        raise RunError("; ".join(reasons))
    privacy_plan(config)


async def serve(coordinator: Coordinator, *, ready: Callable[[], None] = lambda: None) -> None:
    """Connect, and run what was and is submitted until cancelled.

    Args:
        coordinator: what runs.
        ready: called once it is connected.

    Raises:
        BrokerFailed: if the broker refuses this coordinator.
    """
    loop = asyncio.get_running_loop()
    async with await Connection.connect(coordinator.kit) as connection:

        def send(subject: str, data: bytes) -> None:
            """Send from the thread of a run."""
            asyncio.run_coroutine_threadsafe(connection.send(subject, data), loop).result()

        coordinator._send = send
        coordinator.metrics.connected_while(lambda: connection.connected)
        # An inbox for each site, so that one that floods its own crowds out nobody.
        sites = {name: await connection.subscribe(outbox_of(Member("site", name))) for name in coordinator.kit.roster}
        people = await connection.subscribe(FROM_ADMINISTRATORS)
        worker = asyncio.create_task(asyncio.to_thread(coordinator.work))
        ready()

        async def hear(site: str, inbox: Inbox) -> None:
            """Hand a site's messages to the run under way."""
            parts = Assembly()
            async for message in inbox:
                try:
                    whole = parts.take(message.data)
                except MessageRefused:
                    continue
                if whole is not None:
                    coordinator.heard(site, whole)

        async def obey() -> None:
            """Answer administrators."""
            async for message in people:
                sender, verb = message.sender, message.subject.rpartition(".")[2]
                if sender is not None:
                    answer = await asyncio.to_thread(coordinator.obey, sender.name, verb, message.data)
                    await connection.send(inbox_of(sender), answer)

        listeners = [asyncio.create_task(hear(*each)) for each in sites.items()] + [asyncio.create_task(obey())]
        try:
            await asyncio.wait([worker, *listeners], return_when=asyncio.FIRST_COMPLETED)
            for task in (worker, *listeners):
                if task.done():
                    task.result()
        finally:
            coordinator.close()
            await asyncio.wait([worker])
            for task in listeners:
                task.cancel()
