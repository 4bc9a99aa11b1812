"""The program at a site: it connects outwards, answers coordinators, and keeps data, model, ledgers and policy to itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from traceback import extract_tb
from typing import Final, final

from dp_federated_lora.errors import BrokerFailed, DpflError, MessageRefused
from dp_federated_lora.files import FolderLock, write_durably
from dp_federated_lora.monitoring.log import RunLog, open_log
from dp_federated_lora.monitoring.prometheus import SiteMetrics
from dp_federated_lora.network.audit_log import AuditLog
from dp_federated_lora.network.connection import Connection
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.messages import (
    VERSION,
    Asked,
    Ended,
    Failed,
    FromSite,
    Joined,
    Offered,
    Present,
    Refused,
    encode,
    to_site,
)
from dp_federated_lora.network.parts import Assembly
from dp_federated_lora.network.policy import SitePolicy
from dp_federated_lora.network.project import Member
from dp_federated_lora.network.site_run import SiteFacts, SiteRun
from dp_federated_lora.network.subjects import inbox_of, outbox_of
from dp_federated_lora.network.submissions import require_submission
from dp_federated_lora.network.sums import forget_sums

PRESENT_EVERY: Final = 30.0
"""Seconds between two messages of a site that has nothing to say."""

_OFFERED: Final = "offered"
_DEFECT: Final = "an internal error at this site; its own log has more"


@final
class Site:
    """What a site answers, whatever carries the messages.

    Args:
        kit: of the site.
        source: its own data, as `resolve` takes it.
        data_set: what its policy calls them.
        policy: what it takes part in.
        folder: where its state is kept; the same for as long as the site exists.
        threads: cores to compute on; None for all.
        metrics: of this program alone; default new ones, which nobody looks at.

    Raises:
        RunError: if another process works with this folder.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        source: str,
        data_set: str,
        policy: SitePolicy,
        folder: Path,
        threads: int | None = None,
        metrics: SiteMetrics | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = FolderLock(folder)
        self._kit, self.metrics = kit, metrics or SiteMetrics()
        self._facts = SiteFacts(
            name=kit.member.name,
            key=kit.signing,
            roster=kit.roster,
            folder=folder,
            source=source,
            data_set=data_set,
            policy=policy,
            threads=threads,
            metrics=self.metrics,
        )
        self._log: RunLog = open_log(folder / "site.log", run="")
        self._audit = AuditLog.open(folder / "audit.jsonl")
        self._runs: dict[str, SiteRun] = {}

    def close(self) -> None:
        """Let another process work with the folder."""
        self._lock.release()

    def handle(self, data: bytes) -> bytes | None:
        """The answer to a coordinator's message; None where there is none to give."""
        self.metrics.received(len(data))
        try:
            message = to_site(data)
        except MessageRefused as error:
            self._log.warning("a message was refused", reason=str(error))
            return None
        answer = self._answer(message)
        if answer is None:
            return None
        sent = encode(answer)
        self.metrics.sent(len(sent))
        return sent

    def _answer(self, message: Offered | Asked | Ended) -> FromSite | None:
        try:
            match message:
                case Offered():
                    return self._offered(message)
                case Asked():
                    return self._run_of(message.run).answer(message)
                case Ended():
                    self._end(message)
                    return None
        except DpflError as error:
            return self._refusal(message, self._facts.told(error))
        except Exception as error:
            where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in extract_tb(error.__traceback__))
            self._log.error("defect", kind=type(error).__name__, where=where)
            return self._refusal(message, _DEFECT)

    def _offered(self, message: Offered) -> FromSite:
        if message.run not in self._runs:
            require_submission(
                self._kit.administrators,
                submitter=message.submitter,
                project=self._kit.project,
                run=message.run,
                config=message.config,
                signature=message.signature,
            )
            self._runs[message.run] = SiteRun(self._facts, message)
            write_durably(self._facts.folder / "runs" / message.run / _OFFERED, encode(message))
            self._audit.append(f"administrator {message.submitter}", "joined a run", {"run": message.run})
            self._log.info("joined", of=message.run)
            self.metrics.run("joined")
        return Joined(VERSION, message.run)

    def _run_of(self, name: str) -> SiteRun:
        """A run that this site has joined, also before it died."""
        if name not in self._runs:
            stored = self._facts.folder / "runs" / name / _OFFERED
            if not stored.exists():
                raise MessageRefused(f"this site has not joined run {name}: offer it first")
            message = to_site(stored.read_bytes())
            assert isinstance(message, Offered)  # noqa: S101  (written above)
            self._offered(message)
        return self._runs[name]

    def _refusal(self, message: Offered | Asked | Ended, reason: str) -> FromSite:
        self._log.warning("refused", of=message.run, reason=reason)
        if isinstance(message, Asked):
            self.metrics.step("refused")
            return Failed(VERSION, message.run, message.sum_id, message.stage, reason)
        self.metrics.run("refused")
        self._audit.append("this site", "refused a run", {"run": message.run, "reason": reason})
        return Refused(VERSION, message.run, (reason,))

    def _end(self, message: Ended) -> None:
        run = self._runs.pop(message.run, None)
        forget_sums(self._facts.folder / "runs" / message.run / "sums")
        if run is not None:
            run.end()
            self._audit.append("coordinator", "ended a run", {"run": message.run, "reason": message.reason})


async def serve(site: Site, kit: Kit, *, ready: Callable[[], None] = lambda: None) -> None:
    """Answer coordinators until cancelled; a broker that is away is waited for.

    Args:
        site: what answers.
        kit: of the site.
        ready: called once it is connected.

    Raises:
        BrokerFailed: if the broker refuses this site.
    """
    member, parts = Member("site", kit.member.name), Assembly()
    try:
        async with await Connection.connect(kit) as connection:

            async def be_present() -> None:
                """Say again and again that this program runs."""
                while True:
                    with suppress(BrokerFailed):  # it is away, and enough is waiting for it
                        await connection.send(outbox_of(member), encode(Present(VERSION)))
                    await asyncio.sleep(PRESENT_EVERY)

            inbox = await connection.subscribe(inbox_of(member))
            site.metrics.connected_while(lambda: connection.connected)
            present = asyncio.create_task(be_present())
            ready()
            try:
                async for message in inbox:
                    try:
                        whole = parts.take(message.data)
                    except MessageRefused:
                        continue
                    answer = None if whole is None else await _to_the_end(site.handle, whole)
                    if answer is not None:
                        await connection.send(outbox_of(member), answer)
            finally:
                present.cancel()
    finally:
        site.close()


async def _to_the_end(work: Callable[[bytes], bytes | None], message: bytes) -> bytes | None:
    """The result of `work` in a thread; whoever cancels waits for its end, so that nobody else begins meanwhile."""
    task = asyncio.create_task(asyncio.to_thread(work, message))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
