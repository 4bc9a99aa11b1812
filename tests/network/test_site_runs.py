"""Sites and a coordinator that exchange bytes: the same adapter as the simulator, and nothing lost or spent twice by deaths."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs

from dp_federated_lora import train
from dp_federated_lora.errors import (
    BudgetExhausted,
    DpflError,
    IncompatiblePlan,
    LedgerCorrupt,
    LedgerKeyLost,
    PolicyRefused,
    SecureSumAborted,
)
from dp_federated_lora.federated import size_of, terms_of
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.ledgers import ledgers_at
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import TrainResult
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.monitoring.metrics import read_metrics
from dp_federated_lora.network.messages import Answered, Asked, Failed, encode, from_site
from dp_federated_lora.network.site_run import SiteRun
from dp_federated_lora.runtime import decode_request, encode_report, encode_request
from dp_federated_lora.secagg import ServerSession
from federation import RUN, LocalLink, Sites, a_policy, adapter_bytes, coordinate, exchange_of, networked

Raw = dict[str, dict[str, object]]


@pytest.mark.parametrize("trust", ["distributed", "local"])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_simulator_and_sites_behind_a_link_give_the_same_adapter_to_the_bit(
    unit: str, trust: str, request: pytest.FixtureRequest, tmp_path: Path
):
    raw = request.getfixturevalue("raw_config" if unit == "example" else "client_config")
    raw["evaluation"] = {"epsilon": 1.0, "every": 2, "holdout": 0.3}
    config = networked(raw, trust=trust)
    simulated = train(config, out=tmp_path / "simulated")
    sites = Sites(config, tmp_path / "sites")
    over_link = coordinate(config, sites, LocalLink(sites), tmp_path / "linked")
    assert adapter_bytes(simulated.path) == adapter_bytes(over_link.path)
    assert (simulated.path / "metrics.jsonl").read_bytes() == (over_link.path / "metrics.jsonl").read_bytes()
    for name in sites.keys:
        (ledger,) = ledgers_at(str(tmp_path / "sites" / name / "runs" / "run-1" / "ledger.sqlite"))
        assert ledger.spent().charges == 4  # three rounds and one evaluation
        # Local trust composes the same events in another order: rounding, and nothing else.
        rounding = 1e-9 if trust == "local" else 0.0
        assert ledger.spent().epsilon == pytest.approx(over_link.epsilon, rel=rounding, abs=0.0)


# --- deaths and a link that loses, repeats and reorders ------------------------------------------------


class Dead(Exception):
    """The coordinator is killed."""


class Chaos:
    """Answers are lost, repeated and held back by a generator's choice; sites die before or after they answer."""

    def __init__(self, seed: int, *, deaths: float = 0.1) -> None:
        self.draw = random.Random(seed)
        self.rate, self.held = deaths, list[tuple[str, bytes]]()
        self.link: LocalLink | None = None
        self.deaths = 0

    def __call__(self, site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        assert self.link is not None
        if self.draw.random() < self.rate:
            self.deaths += 1
            self.link.sites.runs[site] = self.link.sites.join(site)
            if self.draw.random() < 0.5:
                return []  # it died before the answer left
        sent = [answer for answer in answers for _ in range(self.draw.choice([0, 1, 1, 1, 2]))] + self.held
        self.held = [answer for answer in sent if self.draw.random() < 0.2]
        sent = [answer for answer in sent if answer not in self.held]
        self.draw.shuffle(sent)
        return sent


class Killer:
    """Kills the coordinator when it sends or has received its n-th message."""

    def __init__(self, link: LocalLink, at: int) -> None:
        self.link, self.left = link, at

    @property
    def now(self) -> float:
        return self.link.now

    def send(self, site: str, data: bytes) -> None:
        self.count()
        self.link.send(site, data)

    def receive(self, timeout: float) -> tuple[str, bytes] | None:
        self.count()
        return self.link.receive(timeout)

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Dead


def charges_of(folder: Path, name: str) -> int:
    (ledger,) = ledgers_at(str(folder / name / "runs" / RUN / "ledger.sqlite"))
    return ledger.spent().charges


@pytest.fixture
def undisturbed(raw_config: Raw, tmp_path: Path) -> tuple[Config, dict[str, bytes]]:
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "undisturbed-sites")
    result = coordinate(config, sites, LocalLink(sites), tmp_path / "undisturbed")
    return config, dict(adapter_bytes(result.path))


def test_lost_repeated_and_late_answers_and_deaths_of_sites_change_nothing(undisturbed, tmp_path: Path):
    config, expected = undisturbed
    chaos = Chaos(1)
    sites = Sites(config, tmp_path / "sites")
    chaos.link = link = LocalLink(sites, chaos)
    result = coordinate(config, sites, link, tmp_path / "out", deadline=3600.0)
    assert adapter_bytes(result.path) == expected
    assert chaos.deaths > 3
    assert [charges_of(tmp_path / "sites", name) for name in sites.keys] == [3] * 5


def killed_again_and_again(config: Config, tmp_path: Path, points: list[int]) -> tuple[Sites, TrainResult]:
    sites = Sites(config, tmp_path / "sites")
    for point in points:
        with suppress(Dead):
            coordinate(config, sites, Killer(LocalLink(sites), point), tmp_path / "out")
    return sites, coordinate(config, sites, LocalLink(sites), tmp_path / "out")


def test_a_coordinator_that_is_killed_goes_on_with_the_same_sum(undisturbed, tmp_path: Path):
    config, expected = undisturbed
    sites, result = killed_again_and_again(config, tmp_path, [3, 11, 19, 27, 33, 48, 55, 61])
    assert adapter_bytes(result.path) == expected
    assert [charges_of(tmp_path / "sites", name) for name in sites.keys] == [3] * 5
    (ledger,) = ledgers_at(str(tmp_path / "out"))
    assert (ledger.spent().charges, ledger.spent().released) == (3, 3)


def test_a_coordinator_killed_in_the_sum_of_a_later_group_still_knows_who_was_in_the_first(raw_config: Raw, tmp_path: Path):
    networked(raw_config)
    raw_config["federation"]["clients"] = 9
    raw_config["secure_sum"] = {"colluders": 0, "dropouts": 0.34}
    raw_config["robust"] = {"rule": "median", "byzantine": 1, "groups": 3}
    config = parse_config(raw_config, where="test")
    sites, silent, sums = Sites(config, tmp_path / "sites"), set[str](), list[str]()

    def fault(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        if message.sum_id not in sums:
            sums.append(message.sum_id)
            if len(sums) == 1:
                silent.add(message.members[0])  # of the first group, in the first life of the coordinator
            if len(sums) == 3:
                raise Dead
        return [] if site in silent and len(sums) < 3 else answers

    with suppress(Dead):
        coordinate(config, sites, LocalLink(sites, fault), tmp_path / "out")
    coordinate(config, sites, LocalLink(sites), tmp_path / "out")
    (ledger,) = ledgers_at(str(tmp_path / "out"))
    assert (ledger.spent().charges, ledger.spent().released) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_any_kill_of_the_coordinator_among_any_chaos_gives_the_undisturbed_adapter(undisturbed, tmp_path: Path, seed: int):
    config, expected = undisturbed
    chaos = Chaos(seed)
    sites = Sites(config, tmp_path / "sites")
    chaos.link = link = LocalLink(sites, chaos)
    for _ in range(3):
        with suppress(Dead):
            coordinate(config, sites, Killer(link, chaos.draw.randrange(1, 200)), tmp_path / "out", deadline=3600.0)
    result = coordinate(config, sites, link, tmp_path / "out", deadline=3600.0)
    assert adapter_bytes(result.path) == expected
    assert [charges_of(tmp_path / "sites", name) for name in sites.keys] == [3] * 5


def test_a_site_that_stays_away_costs_its_share_and_too_many_cost_the_charge(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    away: set[str] = {"client-3"}
    sites = Sites(config, tmp_path / "sites")
    link = LocalLink(sites, lambda site, message, answers: [] if site in away else answers)
    result = coordinate(config, sites, link, tmp_path / "one-away")
    assert result.rounds == 3
    away.add("client-1")
    others = Sites(config, tmp_path / "others")
    link = LocalLink(others, lambda site, message, answers: [] if site in away else answers)
    with pytest.raises(SecureSumAborted, match="3 secure sums in a row were aborted.*3 clients answered where 4"):
        coordinate(config, others, link, tmp_path / "two-away")
    (ledger,) = ledgers_at(str(tmp_path / "two-away"))
    assert (ledger.spent().charges, ledger.spent().released) == (3, 0)


# --- a coordinator that lies ----------------------------------------------------------------------------


@pytest.fixture
def site(raw_config: Raw, tmp_path: Path) -> tuple[Sites, SiteRun, Asked]:
    """Sites, one of them, and the first step of an honest sum."""
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "sites")
    asked: list[Asked] = []

    def note(name: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        asked.append(message)
        raise Dead

    with pytest.raises(Dead):
        coordinate(config, sites, LocalLink(sites, note), tmp_path / "out")
    return sites, sites.runs["client-1"], asked[0]


def reason(answer: Answered | Failed) -> str:
    assert isinstance(answer, Failed)
    return answer.reason


def lying(message: Asked, **changes: object) -> Asked:
    """The same step of another sum with another request."""
    request = replace(decode_request(message.request), **changes)
    return structs.replace(message, sum_id="ab" * 32, request=encode_request(request))


def test_a_lying_coordinator_is_refused_by_the_site_with_the_reason(site):
    sites, run, message = site
    assert "there is no such round" in reason(run.answer(lying(message, round=4)))
    assert "clip norm 100" in reason(run.answer(lying(message, clip_norm=100.0)))
    assert "agreed to plan" in reason(run.answer(lying(message, plan_id="0" * 64)))
    few, strangers = message.members[:2], (*message.members[:4], "mallory")
    assert "2 members of a sum that is planned for 5" in reason(
        run.answer(structs.replace(message, sum_id="cd" * 32, members=few))
    )
    assert "once each" in reason(run.answer(structs.replace(message, sum_id="ce" * 32, members=strangers)))
    assert "begun anew" in reason(run.answer(structs.replace(message, sum_id="cf" * 32, stage=2)))
    assert "not a request" in reason(run.answer(structs.replace(message, sum_id="da" * 32, request=b"\x00" * 50)))
    assert charges_of(sites.folder, "client-1") == 0


def test_one_sum_has_one_request_and_one_answer_to_each_step(site):
    _, run, message = site
    first = run.answer(message)
    assert isinstance(first, Answered)
    assert run.answer(message) == first
    assert "begun with" in reason(run.answer(structs.replace(lying(message, round=2), sum_id=message.sum_id)))
    assert "begun with" in reason(run.answer(structs.replace(message, members=message.members[::-1])))
    assert "one before" in reason(run.answer(structs.replace(message, stage=2)))
    assert "another message" in reason(run.answer(structs.replace(message, body=b"x")))


def masked(sites: Sites, message: Asked, sum_id: str) -> bytes:
    """What client-1 gives as masked integers in an honest sum of that name."""
    roster = {name: sites.roster[name] for name in message.members}
    plan, request = privacy_plan(sites.config), decode_request(message.request)
    run = sites.runs["client-1"]
    size = size_of(request, run._client, run._bench.learner)
    server = ServerSession(terms_of(request, plan, size=size, sum_id=sum_id, sent=message.request, roster=roster))
    bodies = dict.fromkeys(message.members, b"")
    for stage in range(3):
        for name, body in bodies.items():
            asked = structs.replace(
                message, sum_id=sum_id, stage=stage, request=message.request if stage == 0 else b"", body=body
            )
            answer = sites.runs[name].answer(asked)
            assert isinstance(answer, Answered), answer
            if (name, stage) == ("client-1", 2):
                return answer.body
            server.receive(name, answer.body)
        bodies = server.advance()
    raise AssertionError


def test_a_round_asked_for_again_is_charged_again_until_nothing_is_left(site):
    sites, run, message = site
    for number in range(1, 4):
        masked(sites, message, f"{number:064x}")
        assert charges_of(sites.folder, "client-1") == number
    with pytest.raises(AssertionError, match="over the budget"):
        masked(sites, message, f"{4:064x}")
    assert charges_of(sites.folder, "client-1") == 3
    assert run._ledger.spent().epsilon <= 8.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"software": "9.9"}, "install the same"),
        ({"model": "ab" * 32}, "plan.models"),
        ({"submitter": "mallory"}, "people.submit"),
        ({"sites": ("client-0", "client-1")}, "2 sites are asked, for a plan of 5"),
        ({"sites": ("client-0", "client-1", "client-2", "client-3", "mallory")}, "mallory is not in the roster"),
        ({"config": "x = "}, "not valid TOML"),
        ({"config": ""}, "missing"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(raw_config: Raw, tmp_path: Path, changes, match: str):
    sites = Sites(networked(raw_config), tmp_path / "sites")
    with pytest.raises(DpflError, match=match):
        SiteRun(sites.facts("client-1"), sites.offered(**changes))


def test_central_trust_and_a_policy_that_asks_for_more_noise_are_refused_with_the_numbers(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "sites")
    facts = replace(sites.facts("client-1"), policy=a_policy(config, min_noise_multiplier=99.0, max_epsilon=1.0))
    with pytest.raises(PolicyRefused, match=r"max_epsilon.*\n.*min_noise_multiplier") as refused:
        SiteRun(facts, sites.offered())
    assert "99" in str(refused.value)
    raw_config["privacy"]["trust"] = "central"
    del raw_config["secure_sum"]
    with pytest.raises(PolicyRefused, match='privacy.trust = "distributed" or "local"'):
        SiteRun(sites.facts("client-1"), sites.offered(config=parse_config(raw_config, where="test").to_toml()))
    raw_config["privacy"]["trust"] = "local"
    with pytest.raises(PolicyRefused, match=r"(?s)min_opened.*trusts.*secure_aggregation"):
        SiteRun(sites.facts("client-1"), sites.offered(config=parse_config(raw_config, where="test").to_toml()))


def test_sums_without_noise_are_not_asked_of_sites(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "sites")
    exchange = exchange_of(config, sites, LocalLink(sites), tmp_path)
    with pytest.raises(IncompatiblePlan, match="never leave a site"):
        exchange(None, [0], None)  # type: ignore[arg-type]


# --- reports of sites: trust = "local" ------------------------------------------------------------------


@pytest.fixture
def reporting(client_config: Raw, tmp_path: Path) -> tuple[Config, dict[str, bytes]]:
    """A run in which every site adds noise of its own, and the adapter that it ends with undisturbed."""
    config = networked(client_config, trust="local")
    return config, dict(adapter_bytes(train(config, out=tmp_path / "undisturbed").path))


def test_reports_that_are_lost_repeated_or_late_and_deaths_of_all_change_nothing(reporting, tmp_path: Path):
    config, expected = reporting
    chaos = Chaos(2)
    sites = Sites(config, tmp_path / "sites")
    chaos.link = link = LocalLink(sites, chaos)
    for point in (2, 4, 7, 11, 13):
        with suppress(Dead):
            coordinate(config, sites, Killer(link, point), tmp_path / "out", deadline=3600.0)
    result = coordinate(config, sites, link, tmp_path / "out", deadline=3600.0)
    assert adapter_bytes(result.path) == expected
    assert chaos.deaths > 0
    assert [charges_of(tmp_path / "sites", name) for name in sites.keys] == [3] * 5


def test_a_report_that_is_missing_misshapen_or_huge_counts_as_nothing_and_without_any_the_run_ends(reporting, tmp_path: Path):
    config, expected = reporting
    lost, sent = {"client-3"}, Workbench.of(config).server(privacy_plan(config))[0].layout.size

    def fault(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        body = {"client-1": b"short", "client-2": encode_report(torch.full((sent,), 1e300, dtype=torch.float64))}.get(site)
        wrong = [(site, encode(Answered(message.version, message.run, message.sum_id, 0, body or b"")))]
        return [] if site in lost else wrong if body else answers

    sites = Sites(config, tmp_path / "sites")
    result = coordinate(config, sites, LocalLink(sites, fault), tmp_path / "out")
    assert adapter_bytes(result.path) != expected
    assert all(math.isfinite(row["update_norm"]) for row in read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert "is not one of" in (tmp_path / "out" / "state" / "exchange.log").read_text()
    lost |= set(sites.keys)
    with pytest.raises(SecureSumAborted, match="no site reported"):
        coordinate(config, Sites(config, tmp_path / "others"), LocalLink(sites, fault), tmp_path / "nothing")


def test_a_method_that_combines_whole_adapters_trains_over_a_link(client_config: Raw, tmp_path: Path):
    client_config["method"] = {"name": "flora"}
    client_config["privacy"]["sampling_rate"] = 1.0
    config = networked(client_config, trust="local")
    expected = adapter_bytes(train(config, out=tmp_path / "simulated").path)
    sites, others = Sites(config, tmp_path / "sites"), Sites(config, tmp_path / "others")
    assert adapter_bytes(coordinate(config, sites, LocalLink(sites), tmp_path / "out").path) == expected
    link = LocalLink(others, lambda site, _, answers: [] if site == "client-2" else answers)
    assert adapter_bytes(coordinate(config, others, link, tmp_path / "short").path) != expected  # with a change of zero


def test_a_rule_bears_a_site_that_is_silent_and_one_that_sends_garbage(client_config: Raw, tmp_path: Path):
    client_config["robust"] = {"rule": "median", "byzantine": 2}
    config = networked(client_config, trust="local")
    sites = Sites(config, tmp_path / "sites")

    def fault(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        garbage = [(site, encode(Answered(message.version, message.run, message.sum_id, 0, b"garbage")))]
        return {"client-3": [], "client-1": garbage}.get(site, answers)

    result = coordinate(config, sites, LocalLink(sites, fault), tmp_path / "out")
    assert [row["round"] for row in read_metrics(result.path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"privacy": {"groups": [{"epsilon": 8.0, "clients": 1}, {"epsilon": 1.0, "clients": 4}]}}, "one budget"),
        ({"federation": {"max_staleness": 1}}, "newest adapter"),
        ({"method": {"name": "fedsa"}}, "keep nothing"),
        ({"training": {"local_control": "scaffold"}}, "keep nothing"),
    ],
)
def test_what_sites_cannot_keep_to_is_refused(client_config: Raw, tmp_path: Path, changes: Raw, match: str):
    networked(client_config, trust="local")
    for section, values in changes.items():
        client_config.setdefault(section, {}).update(values)
    with pytest.raises(PolicyRefused, match=match):
        Sites(parse_config(client_config, where="test"), tmp_path / "sites")


def test_a_late_duplicate_of_a_published_rounds_request_leaves_the_sum_under_way_alone(reporting, tmp_path: Path):
    config, expected = reporting
    sites, first = Sites(config, tmp_path / "sites"), list[Asked]()

    def fault(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        if site == "client-2":
            first.append(message)
            if len(first) > 1:
                assert "was published" in reason(sites.runs[site].answer(first[0]))
                assert sites.runs[site].answer(message) == from_site(answers[0][1])
        return answers

    assert adapter_bytes(coordinate(config, sites, LocalLink(sites, fault), tmp_path / "out").path) == expected
    assert charges_of(tmp_path / "sites", "client-2") == 3


def test_a_shuffler_that_is_not_there_is_refused(client_config: Raw, tmp_path: Path):
    client_config["privacy"]["shuffler"] = True
    config = networked(client_config, trust="local")
    with pytest.raises(PolicyRefused, match=r"remove privacy\.shuffler"):
        Sites(config, tmp_path / "sites")


def test_a_report_has_one_step_one_answer_and_a_charge(reporting, tmp_path: Path):
    config, _ = reporting
    sites, seen = Sites(config, tmp_path / "sites"), list[Asked]()
    coordinate(config, sites, LocalLink(sites, lambda _, message, answers: seen.append(message) or answers), tmp_path / "out")
    first, run = seen[-5], sites.runs["client-0"]
    assert run.answer(first) == run.answer(first)
    assert "there is no step 1" in reason(run.answer(structs.replace(first, stage=1, request=b"")))
    assert "begun with" in reason(run.answer(structs.replace(first, request=lying(first, clip_norm=2.0).request)))
    assert "budget" in reason(run.answer(lying(first)))  # the same round again is another charge, which the plan does not have
    assert charges_of(tmp_path / "sites", "client-0") == 3


# --- ledgers at the site --------------------------------------------------------------------------------


def test_a_site_that_could_not_pay_or_whose_ledger_was_rolled_back_does_not_join(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "sites")
    folder = tmp_path / "sites" / "client-1"
    before = (folder / "lifetime.sqlite").read_bytes()
    coordinate(config, sites, LocalLink(sites), tmp_path / "out")
    after = (folder / "lifetime.sqlite").read_bytes()
    sites.join("client-1")  # as before: what it has paid for is paid
    (folder / "lifetime.sqlite").write_bytes(before)
    with pytest.raises(LedgerCorrupt, match="lacks 3 charges of run run-1: it was rolled back"):
        sites.join("client-1")
    (folder / "lifetime.sqlite").write_bytes(after)
    key = (folder / "lifetime.key").read_bytes()
    (folder / "lifetime.key").unlink()
    with pytest.raises(LedgerKeyLost):
        sites.join("client-1")
    (folder / "lifetime.key").write_bytes(key)
    (rules,) = sites.policy.data_set
    events = [privacy_plan(config).event] * 3
    budgets = (rules.model_copy(update={"epsilon": step / 4.0}) for step in range(20, 400))
    once = next(r for r in budgets if r.lifetime_epsilon(events) <= r.epsilon < r.lifetime_epsilon(events * 2))
    poor = sites.policy.model_copy(update={"data_set": (once,)})
    other = Sites(config, tmp_path / "others", policy=poor)
    other.join("client-1")
    with pytest.raises(BudgetExhausted, match="3 charges would take .* over the budget"):
        coordinate(config, other, LocalLink(other), tmp_path / "one")
        SiteRun(other.facts("client-1"), structs.replace(other.offered(), run="run-2"))


def test_the_reason_of_a_site_that_leaves_every_sum_is_in_the_error(raw_config: Raw, tmp_path: Path):
    config = networked(raw_config)
    sites = Sites(config, tmp_path / "sites")

    def lost(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        failed = Failed(message.version, message.run, message.sum_id, message.stage, "the disk is full")
        return [(site, encode(failed))] if site in ("client-0", "client-1") and message.stage == 2 else answers

    with pytest.raises(SecureSumAborted, match="in a row.*client-0: the disk is full; client-1: the disk is full"):
        coordinate(config, sites, LocalLink(sites, lost), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_rounds_of_chaos_all_complete(raw_config: Raw, tmp_path: Path):
    raw_config["training"] |= {"head_rounds": 999}
    config = networked(raw_config, rounds=1000)
    chaos = Chaos(1, deaths=0.003)
    sites = Sites(config, tmp_path / "sites")
    chaos.link = link = LocalLink(sites, chaos)
    for point in range(2_000, 30_000, 2_000):
        with suppress(Dead):
            coordinate(config, sites, Killer(link, point), tmp_path / "out", deadline=3600.0)
    result = coordinate(config, sites, link, tmp_path / "out", deadline=3600.0)
    (ledger,) = ledgers_at(str(tmp_path / "out"))
    assert (result.rounds, ledger.spent().charges, ledger.spent().released) == (1000, 1000, 1000)
    assert chaos.deaths > 50
    assert [charges_of(tmp_path / "sites", name) for name in sites.keys] == [1000] * 5
