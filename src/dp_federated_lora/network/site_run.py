"""A site's part in one run: messages in, messages out, no socket. It checks everything itself and charges its own ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Final, final

from dp_federated_lora.data import read_table, resolve
from dp_federated_lora.errors import DpflError, LedgerCorrupt, MessageRefused, PolicyRefused
from dp_federated_lora.federated import ClientMemory, Purpose, Request, RoundKeyFile, report, share, size_of, terms_of
from dp_federated_lora.lab.config import Config, parse_config_text
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench, linear_method
from dp_federated_lora.monitoring.log import open_log
from dp_federated_lora.monitoring.prometheus import SiteMetrics
from dp_federated_lora.network.messages import VERSION, Answered, Asked, Failed, Offered
from dp_federated_lora.network.offer import Offer, model_id
from dp_federated_lora.network.policy import SitePolicy
from dp_federated_lora.network.sums import SumFolder
from dp_federated_lora.privacy import Ledger, Permit, SecureRandom, Trust
from dp_federated_lora.runtime import decode_request, encode_report
from dp_federated_lora.secagg import STAGES, ClientSession, Terms
from dp_federated_lora.signing import SigningKey

_MASK: Final = STAGES.index("mask")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What a site is and holds, whatever the run.

    Args:
        name: of the site.
        key: its signing key.
        roster: public signing keys of all sites, from its own kit.
        folder: where its state is kept.
        source: its own data, as `resolve` takes it.
        data_set: what its policy calls them.
        policy: what it takes part in.
        threads: cores to compute on; None for all.
        metrics: of the program.
    """

    name: str
    key: SigningKey
    roster: Mapping[str, str]
    folder: Path
    source: str
    data_set: str
    policy: SitePolicy
    threads: int | None = None
    metrics: SiteMetrics = field(default_factory=SiteMetrics)

    def told(self, error: DpflError) -> str:
        """An error as others may read it: this site's paths are nobody else's business."""
        return str(error).replace(str(self.folder), "this site's state")


@final
class SiteRun:
    """One run that a site has joined.

    Everything that binds is the site's own: the plan that it calculates from the configuration, its policy, its ledgers, its
    roster. The model is loaded once and kept.

    Args:
        facts: of the site.
        offered: the run.

    Raises:
        PolicyRefused: if the site does not take part, with every reason.
        DpflError: if the configuration, the model or the data cannot be used here, or the ledgers cannot be opened.
    """

    def __init__(self, facts: SiteFacts, offered: Offered) -> None:
        self._facts, self._offered = facts, offered
        config = _own(parse_config_text(offered.config, where=f"the configuration of run {offered.run}"), facts)
        self._plan = privacy_plan(config)
        _require_alike(facts, offered, config)
        offer = Offer.of(config, model=offered.model, submitter=offered.submitter, data_set=facts.data_set)
        facts.policy.admit(offer)  # before anything is fetched or read on somebody's word
        model = model_id(resolve(config.model.source, sha256=config.model.sha256))
        if model != offered.model:
            raise PolicyRefused(
                f"the base model at the coordinator is {offered.model[:12]}, here {model[:12]}: both sides need the same files"
            )
        self._lifetime = facts.policy.open_ledgers(facts.folder / "lifetime.sqlite", offer)
        self._folder = facts.folder / "runs" / offered.run
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._ledger = Ledger.open(self._folder / "ledger.sqlite", budget=self._plan.budget, owner=facts.name)
        self._require_room(offer)
        self._seed = config.run.insecure_seed
        self._bench = Workbench.of(config)
        memory = ClientMemory(self._folder / "clients")
        number = offered.sites.index(facts.name)
        table = read_table(resolve(facts.source))
        self._client = self._bench.client(self._plan, facts.name, number, table, memory)
        self._bench.prepare(self._plan, self._client.examples, self._client.held_out)
        self._log = open_log(self._folder / "run.log", run=offered.run)
        self._tell_spent()

    def answer(self, message: Asked) -> Answered | Failed:
        """The answer to one step of a secure sum, or a report; the same again if it is asked again.

        Refusals and errors of this software are answered by their reason, which names public facts alone; anything else is a
        defect, whose text could hold data and stays here.
        """
        try:
            body = self._answered(message)
        except DpflError as error:
            self._log.warning("out of a secure sum", reason=str(error))
            self._facts.metrics.step("refused")
            return Failed(VERSION, message.run, message.sum_id, message.stage, self._facts.told(error))
        self._facts.metrics.step("answered")
        return Answered(VERSION, message.run, message.sum_id, message.stage, body)

    def _answered(self, message: Asked) -> bytes:
        sums = self._folder / "sums"
        folder = SumFolder.find(sums, message)
        if folder is not None and (known := folder.answered(message)) is not None:
            return known
        sent = message.request if folder is None else folder.request
        request = decode_request(sent)
        self._require_agreed(message, request)
        if self._plan.trust is Trust.LOCAL:
            folder = folder or SumFolder.begin(sums, message)
            permit, stream = self._charged(request, folder)
            reported = report(request, self._client, self._bench.learner, permit, stream)
            answer = encode_report(reported.value)
            folder.keep(message, b"", answer)
            return answer
        terms = self._terms(message, request, sent)
        folder = folder or SumFolder.begin(sums, message)  # what is refused before is not kept
        session = ClientSession(self._facts.name, terms, self._facts.key)
        if folder.session:
            session = ClientSession.from_bytes(folder.session, terms, self._facts.key)
        integers = None
        if message.stage == _MASK:
            permit, stream = self._charged(request, folder)
            integers = share(request, self._client, self._bench.learner, permit=permit, rng=stream).numpy()
        answer = session.answer(message.body, integers)
        folder.keep(message, session.to_bytes(), answer)
        return answer

    def _require_agreed(self, message: Asked, request: Request) -> None:
        """Refuse, with the reason, what is not of the run that this site agreed to."""
        self._client.require_plan(request)
        last = self._plan.rounds
        if not 1 <= request.round <= last:
            raise MessageRefused(f"round {request.round} of a run of {last}: there is no such round")
        if request.clip_norm != self._plan.clip_norm and self._plan.adaptive_clip is None:
            raise MessageRefused(f"clip norm {request.clip_norm:g} where the plan says {self._plan.clip_norm:g}")
        if request.purpose is Purpose.EVALUATION and self._plan.evaluation is None:
            raise MessageRefused("the plan that this site agreed to has no evaluation")
        self._ledger.require_open(request.round, request.purpose.value)
        strangers = [name for name in message.members if name not in self._offered.sites]
        if strangers or self._facts.name not in message.members or len(set(message.members)) != len(message.members):
            raise MessageRefused("members of a sum are sites of the run, once each, and whom they are named to")
        if message.stage and self._plan.trust is Trust.LOCAL:
            raise MessageRefused(f"a report has one step: there is no step {message.stage}")

    def _terms(self, message: Asked, request: Request, sent: bytes) -> Terms:
        """What this site agrees to about the secure sum."""
        roster = {name: self._facts.roster[name] for name in message.members}
        size = size_of(request, self._client, self._bench.learner)
        return terms_of(request, self._plan, size=size, sum_id=message.sum_id, sent=sent, roster=roster)

    def _charged(self, request: Request, folder: SumFolder) -> tuple[Permit, SecureRandom]:
        """Charge this site's own ledgers for a contribution; what its noise is then drawn with."""
        evaluation = self._plan.evaluation if request.purpose is Purpose.EVALUATION else None
        charged = self._plan.event_in(request.round) if evaluation is None else evaluation.event
        stream = self._stream(request, folder)
        purpose, number = request.purpose.value, request.round
        for earlier in self._earlier(number):  # that a later round is asked for says that they were released
            self._ledger.commit(earlier)
        of_run = f"{purpose}, run {self._ledger.rows()[0].hash}"
        lifetime = [self._lifetime[purpose]]
        Ledger.charge_all(lifetime, charged, round=number, purpose=of_run, commitment=stream.commitment)
        permit = self._ledger.reserve(charged, round=number, purpose=purpose, commitment=stream.commitment)
        self._facts.metrics.contributed(purpose)
        self._tell_spent()
        self._log.info("contributing", round=number, epsilon=self._ledger.spent().epsilon)
        return permit, stream

    def _require_room(self, offer: Offer) -> None:
        """Refuse a run that this site's ledgers could not pay for to its end, or whose ledgers were rolled back."""
        database, charged = self._facts.folder / "lifetime.sqlite", set[str]()
        for ledger in Ledger.read_all(database):
            charged |= ledger.commitments
        for own in sorted((self._facts.folder / "runs").glob("*/ledger.sqlite")):
            if missing := Ledger.read(own).commitments - charged:
                raise LedgerCorrupt(
                    f"the lifetime ledger of this site lacks {len(missing)} charges of run {own.parent.name}: it was rolled "
                    "back; restore the newest one"
                )
        paid = [row.facts["purpose"] for row in self._ledger.rows() if row.kind == "reserve"]
        for purpose, events in offer.purposes.items():
            left = events[paid.count(purpose) :]
            self._lifetime[purpose].require_room(left)

    def _earlier(self, number: int) -> list[int]:
        """Serials of the last charge of each release before round `number` that is not recorded as published yet."""
        rows = self._ledger.rows()
        published = {row.facts["of"] for row in rows if row.kind == "commit"}
        last = {(row.round, row.facts["purpose"]): row.serial for row in rows if row.kind == "reserve"}
        return [serial for (round_, _), serial in last.items() if round_ < number and serial not in published]

    def _stream(self, request: Request, folder: SumFolder) -> SecureRandom:
        """This site's stream for a sum: from its own entropy, kept until the sum is over.

        With an insecure seed it is the one that a simulator has, of the first attempt that is not charged yet.
        """
        kept, number, purpose = RoundKeyFile(folder.key), request.round, request.purpose
        if self._seed is None or folder.key.exists():
            return kept.open_round(number, insecure_seed=None)
        for attempt in count():
            key = kept.open_round(number, insecure_seed=self._seed, attempt=attempt)
            key = key if purpose is Purpose.TRAINING else key.derive(purpose.value)
            stream = key.derive("site", self._facts.name)
            if stream.commitment not in self._ledger.commitments:
                break
        kept.keep(number, stream)
        return stream

    def _tell_spent(self) -> None:
        metrics = self._facts.metrics
        metrics.run_spent(self._offered.run, self._ledger.spent().epsilon, self._ledger.budget.epsilon)
        for purpose, ledger in self._lifetime.items():
            metrics.lifetime_spent(self._facts.data_set, purpose, ledger.spent().epsilon, ledger.budget.epsilon)

    def end(self) -> None:
        """Nothing more will be asked: what was charged counts as released."""
        for charge in self._earlier(self._plan.rounds + 1):
            self._ledger.commit(charge)
        self._facts.metrics.run_over(self._offered.run)
        self._log.info("run ended", epsilon=self._ledger.spent().epsilon)


def software() -> str:
    """Version of this package; sites and coordinator run the same."""
    return version("dp-federated-lora-lab")


def unfit_for_sites(config: Config) -> list[str]:
    """Why a configuration cannot be run by sites of a network; empty if it can."""
    reasons = []
    if config.privacy.trust == "central":
        reasons.append('sums without noise never leave a site: set privacy.trust = "distributed" or "local"')
    if config.privacy.shuffler:
        reasons.append("the coordinator knows whose report it gets: remove privacy.shuffler")
    if config.privacy.groups or config.federation.max_staleness:
        reasons.append("sites know one budget, and get the newest adapter: remove privacy.groups and federation.max_staleness")
    if linear_method(config).kept or config.training.local_control:
        reasons.append("sites keep nothing from round to round: choose another method, and remove training.local_control")
    if config.federation.dropout_rate or config.ledger:
        reasons.append("sites drop out by themselves and keep their own ledgers: remove federation.dropout_rate and [ledger]")
    return reasons


def _own(config: Config, facts: SiteFacts) -> Config:
    """The configuration without what would touch this machine's files or cores by somebody else's word."""
    run = config.run.model_copy(update={"out": str(facts.folder), "cache": None, "device": None, "threads": facts.threads})
    return config.model_copy(update={"run": run, "ledger": None})


def _require_alike(facts: SiteFacts, offered: Offered, config: Config) -> None:
    """Both sides have the same software, model and list of sites; errors name both."""
    reasons = []
    if offered.software != software():
        reasons.append(f"the coordinator runs version {offered.software}, this site {software()}: install the same")
    sites = offered.sites
    if len(set(sites)) != len(sites) or len(sites) != config.federation.clients or facts.name not in sites:
        reasons.append(f"{len(sites)} sites are asked, for a plan of {config.federation.clients} participants with this one")
    if strangers := [name for name in sites if name not in facts.roster]:
        reasons.append(f"{strangers[0]} is not in the roster of this site's kit: get a newer kit, or refuse that site")
    reasons += unfit_for_sites(config)
    if reasons:
        raise PolicyRefused("; ".join(reasons))
