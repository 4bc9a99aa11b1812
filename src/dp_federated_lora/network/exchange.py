"""The coordinator's side of secure sums and of noised reports: an `Exchange` whose participants are sites behind a link."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, final

import torch
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, MessageRefused, SecureSumAborted
from dp_federated_lora.federated import Purpose, Request, Sites, terms_of
from dp_federated_lora.files import write_durably
from dp_federated_lora.monitoring.log import RunLog
from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics
from dp_federated_lora.network.messages import VERSION, Answered, Asked, Failed, encode, from_site
from dp_federated_lora.privacy import BoundedSum, PrivacyPlan, Released, SecureRandom
from dp_federated_lora.runtime import decode_report, encode_request
from dp_federated_lora.secagg import STAGES, ServerSession

AT_A_TIME: Final = 64
"""Sites that are asked at the same time: more answers than the broker holds for one reader would be lost."""


class Link(Protocol):
    """Carries bytes to sites and back; it may lose, repeat or reorder them, but never say the wrong sender."""

    def send(self, site: str, data: bytes) -> None:
        """Send to a site; returns at once."""

    def receive(self, timeout: float) -> tuple[str, bytes] | None:
        """The next message and who sent it, or None after so many seconds.

        Raises:
            RunInterrupted: if the run is to stop.
        """


@final
class SiteExchange:
    """Secure sums of sites, and reports of sites, which are asked for as sums of one step.

    A step of a sum ends when all have answered or at its deadline; the first, before which nothing is charged, waits until enough
    are there. A report is charged in its only step. Who was in each step is on disk before the next begins, so
    that a coordinator that died continues the same sum, whose answers sites send again.

    Args:
        run: name of the run.
        names: all sites, in the order of participants.
        plan: of the run.
        roster: public signing keys by name.
        link: to the sites.
        folder: where the members of steps are kept.
        deadline: seconds for one step.
        patience: seconds to wait for enough sites to begin a sum.
        log: of the run.
        metrics: of the coordinator; default new ones, which nobody looks at.
        again: seconds after which who has not answered is asked again: messages get lost, and sites answer the same twice.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        run: str,
        names: Sequence[str],
        plan: PrivacyPlan,
        *,
        roster: Mapping[str, str],
        link: Link,
        folder: Path,
        deadline: float,
        patience: float = 0.0,
        log: RunLog,
        metrics: CoordinatorMetrics | None = None,
        again: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names = tuple(names)
        self._run, self._plan, self._roster, self._link = run, plan, roster, link
        self._folder, self._deadline, self._again = folder, deadline, again
        self._clock, self._patience = clock, patience
        self._part = ""  # of the run: a round's training or evaluation
        self._reasons: dict[str, str] = {}  # of sites that left the sum under way
        self._log, self._metrics = log, metrics or CoordinatorMetrics()

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Refused: sums without noise never leave a site."""
        raise IncompatiblePlan('sums without noise never leave a site: submit privacy.trust = "distributed" or "local"')

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Reports of sites, in the order of participants; each charges its own ledger, and draws its own noise.

        A site that does not answer in time, or with another shape, counts as one that sent no number.
        """
        members = [name for name in self.names if name in sites]
        sum_id, sent = self._begin(request, sites, members)
        values: dict[str, Tensor] = {}

        def take(name: str, body: bytes) -> None:
            try:
                values[name] = decode_report(body, size=size)
            except MessageRefused as error:
                self._log.warning("a report was refused", site=name, reason=str(error))
                self._metrics.refused("answer")

        def ask(_: str) -> bytes:
            return encode(Asked(VERSION, self._run, sum_id, tuple(members), 0, sent, b""))

        with self._metrics.sum_under_way(), self._metrics.step_under_way("report"):
            self._step(sum_id, 0, members, ask=ask, take=take, enough=1)
        if not values:
            raise SecureSumAborted(f"no site reported{self._why}")
        evaluation = self._plan.evaluation if request.purpose is Purpose.EVALUATION else None
        source, bound = (evaluation, evaluation.BOUND) if evaluation else (self._plan, self._plan.sensitivity(request.clip_norm))
        noise_std = source.mechanism.noise_multiplier * bound
        nothing = torch.full((size,), math.nan, dtype=torch.float64)
        for name in members:
            yield Released(values.get(name, nothing), noise_std, sites[name][1].insecure)

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """A secure sum of sites; each charges its own ledger, and draws its own noise."""
        sum_id, sent = self._begin(request, sites, members)
        roster = {name: self._roster[name] for name in members}
        terms = terms_of(request, self._plan, size=size, sum_id=sum_id, sent=sent, roster=roster)
        server, messages = ServerSession(terms), dict.fromkeys(members, b"")
        with self._metrics.sum_under_way():
            for stage in range(len(STAGES)):

                def ask(name: str, stage: int = stage, bodies: Mapping[str, bytes] = messages) -> bytes:
                    first = sent if stage == 0 else b""
                    return encode(Asked(VERSION, self._run, sum_id, tuple(members), stage, first, bodies[name]))

                try:
                    with self._metrics.step_under_way(STAGES[stage]):
                        self._step(sum_id, stage, list(messages), ask=ask, take=server.receive, enough=terms.min_cohort)
                    messages = server.advance()
                except SecureSumAborted as error:
                    raise SecureSumAborted(f"{error}{self._why}") from error
        return torch.from_numpy(server.total.integers.astype("int64"))

    @property
    def _why(self) -> str:
        """Reasons of those who left the sum, to go after an error."""
        return "".join(f"; {name}: {reason}" for name, reason in self._reasons.items())

    def _step(
        self,
        sum_id: str,
        stage: int,
        asked: Sequence[str],
        *,
        ask: Callable[[str], bytes],
        take: Callable[[str, bytes], None],
        enough: int,
    ) -> None:
        """Ask, and `take` answers until all that can come are there; then write down who answered."""
        before = self._members_of(sum_id, stage)
        missing = set(asked) if before is None else set(before)
        answered: list[str] = []
        turns = _Turns(sorted(missing), self._again)
        deadline = self._clock() + self._deadline
        if stage == 0 and before is None:
            deadline = max(deadline, self._clock() + self._patience)
        while missing and (now := self._clock()) < deadline:
            for name in turns.due(now, missing):
                self._link.send(name, ask(name))
            received = self._link.receive(max(min(turns.next(now), deadline) - now, 0.0))
            if received is None or received[0] not in missing:
                continue
            name, data = received
            try:
                match from_site(data):
                    case Answered(run=self._run, sum_id=own, stage=which, body=body) if (own, which) == (sum_id, stage):
                        take(name, body)
                        answered.append(name)
                        missing.discard(name)
                        if len(answered) == enough:  # the others get a step's time, and no more
                            deadline = min(deadline, self._clock() + self._deadline)
                    case Failed(run=self._run, sum_id=own, stage=which, reason=reason) if (own, which) == (sum_id, stage):
                        self._log.warning("a site left a secure sum", site=name, reason=reason)
                        self._metrics.refused("sum")
                        self._reasons[name] = reason
                        missing.discard(name)
            except (MessageRefused, SecureSumAborted) as error:
                self._log.warning("an answer was refused", site=name, reason=str(error))
                self._metrics.refused("answer")
            if name not in missing:
                turns.over(name)
        if before is not None and sorted(answered) != sorted(before):
            raise SecureSumAborted(f"of {len(before)} who answered step {stage} before, {len(answered)} answered it again")
        if before is None:
            self._metrics.sites_lost(len(asked) - len(answered))
            write_durably(self._file(sum_id, stage), "\n".join(sorted(answered)).encode())

    def _members_of(self, sum_id: str, stage: int) -> list[str] | None:
        """Who answered a step before this coordinator died; None if nobody knows."""
        file = self._file(sum_id, stage)
        return file.read_text(encoding="utf-8").split() if file.exists() else None

    def _file(self, sum_id: str, stage: int) -> Path:
        return self._folder / self._part / f"{sum_id}-{stage}"

    def _begin(self, request: Request, sites: Sites, members: Sequence[str]) -> tuple[str, bytes]:
        """The id of a sum, and its request as bytes.

        What is known of other sums of this part of the run stays, as groups have one each; of other parts it is forgotten.
        """
        self._reasons.clear()
        self._part = part = f"{request.round}-{request.purpose.value}"
        (self._folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in self._folder.iterdir():
            if other.name != part:
                shutil.rmtree(other)
        streams = "".join(sites[name][1].commitment for name in members)
        return hashlib.sha256(f"{self._run} {request.purpose.value} {streams}".encode()).hexdigest(), encode_request(request)


@final
class _Turns:
    """Whose turn it is to be asked: at most `AT_A_TIME` at the same time, and again after a while without an answer."""

    def __init__(self, names: Sequence[str], again: float) -> None:
        self._waiting, self._again = deque(names), again
        self._asked: dict[str, float] = {}

    def due(self, now: float, missing: Collection[str]) -> Iterator[str]:
        """Who of those still missing is to be asked now."""
        for name in [name for name, then in self._asked.items() if now - then >= self._again]:
            del self._asked[name]
            self._waiting.append(name)
        while self._waiting and len(self._asked) < AT_A_TIME:
            name = self._waiting.popleft()
            if name in missing:
                self._asked[name] = now
                yield name

    def next(self, now: float) -> float:
        """When somebody is to be asked again, if nobody answers."""
        return min(self._asked.values(), default=now) + self._again

    def over(self, name: str) -> None:
        """Nothing is due from `name` any more."""
        self._asked.pop(name, None)
