"""A site's policy: each rule just at its limit and just beyond, and files that are wrong."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from math import inf, nextafter
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dp_federated_lora.cli import main as cli
from dp_federated_lora.errors import BudgetExhausted, BudgetMismatch, ConfigError, ModelError, PolicyRefused
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.network.offer import Offer, model_id
from dp_federated_lora.network.policy import DataSetRules, Refusal, SitePolicy
from dp_federated_lora.privacy import (
    Budget,
    GaussianMechanism,
    Ledger,
    PoissonSampler,
    PrivacyPlan,
    PrivateEvaluation,
    Scope,
    SecureRandom,
    Tier,
    Trust,
)
from plans import a_plan

Raw = dict[str, Any]
RUNNER = CliRunner()
MODEL, DELTA = "ab" * 32, 1e-5
BUDGET = Budget(8.0, DELTA)
PLAIN = a_plan(budget=BUDGET, mechanism=GaussianMechanism(1.5))
SCORED = replace(PLAIN, evaluation=PrivateEvaluation(noise_multiplier=4.0, every=2, loss_cap=4.0))
TIERS = (Tier(BUDGET, 10, 0.5, 1.0), Tier(Budget(8.5, 2e-5), 10, 0.25, 0.5))
GROUPED = replace(PLAIN, tiers=TIERS)


def an_offer(plan: PrivacyPlan = PLAIN, **changes: Any) -> Offer:
    facts: Raw = {"method": "ffa", "model": MODEL, "participants": 20, "opened": 12, "seeded": False}
    return Offer(plan=plan, **(facts | {"submitter": "alice", "data_set": "wards"} | changes))


def a_policy() -> Raw:
    """One that lets every offer of this module pass."""
    return {
        "data_set": [{"name": "wards", "purposes": ["training", "evaluation"], "epsilon": 50.0, "delta": DELTA}],
        "plan": {
            "max_epsilon": 10.0,
            "max_delta": 1e-4,
            "min_noise_multiplier": 0.1,
            "min_participants": 2,
            "min_opened": 1,
            "units": ["client", "example"],
            "trusts": ["central", "local", "distributed"],
            "methods": ["ffa"],
            "models": [MODEL],
            "secure_aggregation": False,
            "allow_insecure_seed": True,
        },
        "people": {"submit": ["alice"]},
    }


def with_rule(rule: str, value: object) -> SitePolicy:
    """The policy with one key changed."""
    raw = deepcopy(a_policy())
    section, key = rule.split(".")
    (raw["data_set"][0] if section == "data_set" else raw[section])[key] = value
    return SitePolicy.model_validate(raw)


def below(value: float) -> float:
    return nextafter(value, 0.0)


def above(value: float) -> float:
    return nextafter(value, inf)


LIMITS = [
    ("plan.max_epsilon", 8.0, below(8.0), an_offer()),
    ("plan.max_epsilon", 8.5, below(8.5), an_offer(GROUPED)),
    ("plan.max_delta", DELTA, below(DELTA), an_offer()),
    ("plan.max_delta", 2e-5, below(2e-5), an_offer(GROUPED)),
    ("plan.min_noise_multiplier", 1.5, above(1.5), an_offer()),
    ("plan.min_noise_multiplier", 1.5, above(1.5), an_offer(GROUPED)),
    ("plan.min_noise_multiplier", 1.25, above(1.25), an_offer(replace(SCORED, mechanism=GaussianMechanism(1.25)))),
    ("plan.min_participants", 20, 21, an_offer()),
    ("plan.min_opened", 12, 13, an_offer()),
    ("plan.units", ["client"], ["example"], an_offer()),
    ("plan.trusts", ["central"], ["local", "distributed"], an_offer()),
    ("plan.trusts", ["local"], ["central", "distributed"], an_offer(replace(PLAIN, trust=Trust.LOCAL, sites=20))),
    ("plan.methods", ["fedavg", "ffa"], ["fedavg", "ff", "ffa "], an_offer()),
    ("plan.models", [MODEL], ["ba" * 32], an_offer()),
    ("plan.secure_aggregation", False, True, an_offer()),
    ("plan.allow_insecure_seed", True, False, an_offer(seeded=True)),
    ("people.submit", ["bob", "alice"], ["bob", "Alice"], an_offer()),
    ("data_set.name", "wards", "ward", an_offer()),
    ("data_set.purposes", ["training"], ["evaluation"], an_offer()),
    ("data_set.purposes", ["training", "evaluation"], ["training"], an_offer(SCORED)),
]


@pytest.mark.parametrize(("rule", "limit", "beyond", "offer"), LIMITS)
def test_an_offer_passes_at_the_limit_of_a_rule_and_is_refused_just_beyond(rule: str, limit: Any, beyond: Any, offer: Offer):
    assert with_rule(rule, limit).refusals(offer) == ()
    (refusal,) = with_rule(rule, beyond).refusals(offer)
    assert refusal.rule == rule
    allowed = tuple(beyond) if isinstance(beyond, list) else (beyond,) if rule == "data_set.name" else beyond
    assert refusal.allowed == allowed
    assert str(refusal).startswith(f"{rule}: ")
    if isinstance(limit, float | int) and not isinstance(limit, bool):
        assert refusal.asked == limit
        assert f"{limit!r}" in str(refusal)
        assert f"{beyond!r}" in str(refusal)


def test_an_evaluation_with_little_noise_is_seen_beside_training_with_much():
    faint = replace(SCORED, evaluation=PrivateEvaluation(noise_multiplier=0.9, every=3, loss_cap=4.0), budget=Budget(9.0, DELTA))
    assert with_rule("plan.min_noise_multiplier", 0.9).refusals(an_offer(faint)) == ()
    (refusal,) = with_rule("plan.min_noise_multiplier", 1.0).refusals(an_offer(faint))
    assert refusal.reason == "the noise multiplier is at least 1.0 here, and evaluation has 0.9"


def dearest_at_the_limit(events: tuple[object, ...]) -> float:
    """The least budget that a ledger needs for the events, at the order that a ledger of this budget counts at."""

    def cost(epsilon: float) -> float:
        rules = DataSetRules(name="wards", purposes=(), epsilon=epsilon, delta=DELTA)
        return rules.lifetime_epsilon(events)  # type: ignore[arg-type]

    epsilon = 50.0
    for _ in range(50):
        epsilon = cost(epsilon)
    assert cost(epsilon) == epsilon
    assert cost(below(epsilon)) == epsilon
    return epsilon


@pytest.mark.parametrize("offer", [an_offer(), an_offer(SCORED)], ids=["training", "evaluation"])
def test_a_run_that_alone_costs_more_than_the_lifetime_budget_is_refused_exactly_where_its_ledger_would(
    offer: Offer, tmp_path: Path
):
    purpose, events = list(offer.purposes.items())[-1]
    limit = dearest_at_the_limit(events)
    raw = a_policy()
    own = {"name": "wards", "purposes": [purpose], "delta": DELTA}
    raw["data_set"][0]["purposes"] = [each for each in offer.purposes if each != purpose]
    policy = SitePolicy.model_validate(raw | {"data_set": [*raw["data_set"], own | {"epsilon": limit}]})
    ledger = policy.open_ledgers(tmp_path / "site.sqlite", offer)[purpose]
    scarce = SitePolicy.model_validate(raw | {"data_set": [*raw["data_set"], own | {"epsilon": below(limit)}]})
    (refusal,) = scarce.refusals(offer)
    assert (refusal.rule, refusal.allowed, refusal.asked) == ("data_set.epsilon", below(limit), limit)
    assert f'lifetime epsilon of "wards" for {purpose}, at delta 1e-05, is at most' in str(refusal)

    (poor,) = Ledger.open_all(tmp_path / "x.sqlite", ["x"], budget=Budget(below(limit), DELTA), scope=Scope.LIFETIME)
    for number, event in enumerate(events, start=1):
        commitment = SecureRandom.insecure_from(number).commitment
        Ledger.charge_all([ledger], event, round=number, purpose="run 1", commitment=commitment)
        if number < len(events):
            Ledger.charge_all([poor], event, round=number, purpose="run 1", commitment=commitment)
    with pytest.raises(BudgetExhausted):
        Ledger.charge_all([poor], event, round=number, purpose="run 1", commitment=commitment)
    assert ledger.spent().epsilon == limit


def test_all_broken_rules_are_reported_at_once_with_numbers_and_words():
    raw = a_policy()
    raw["plan"] |= {"max_epsilon": 4, "min_participants": 30, "min_opened": 13, "units": ["example"], "methods": [], "models": []}
    raw["plan"] |= {"max_delta": 1e-6, "min_noise_multiplier": 2.0, "secure_aggregation": True, "trusts": ["distributed"]}
    raw["plan"].pop("allow_insecure_seed")
    policy = SitePolicy.model_validate(raw | {"people": {"submit": []}, "data_set": []})
    found = policy.refusals(an_offer(SCORED, seeded=True))
    assert [refusal.rule for refusal in found] == [
        *("people.submit", "data_set.name", "data_set.name", "plan.max_epsilon", "plan.max_delta", "plan.min_noise_multiplier"),
        *("plan.min_participants", "plan.min_opened", "plan.units", "plan.trusts", "plan.methods", "plan.models"),
        *("plan.secure_aggregation", "plan.allow_insecure_seed"),
    ]
    assert found[3] == Refusal("plan.max_epsilon", 4.0, 8.0, "epsilon is at most 4.0 here, and the run has 8.0")
    assert found[10].reason == 'the method is "ffa", and this site allows nothing: its list is empty'
    with pytest.raises(PolicyRefused) as caught:
        policy.admit(an_offer(SCORED, seeded=True))
    assert all(str(refusal) in str(caught.value) for refusal in found)


@pytest.mark.parametrize("rule", ["plan.units", "plan.trusts", "plan.methods", "plan.models", "people.submit"])
def test_an_empty_list_allows_nothing(rule: str):
    (refusal,) = with_rule(rule, []).refusals(an_offer())
    assert (refusal.rule, refusal.allowed) == (rule, ())


def test_no_data_set_and_no_purpose_allow_nothing():
    (refusal,) = with_rule("data_set.purposes", []).refusals(an_offer())
    assert str(refusal) == (
        'data_set.purposes: the purpose of using "wards" is "training", and this site allows nothing: its list is empty'
    )
    (refusal,) = SitePolicy.model_validate(a_policy() | {"data_set": []}).refusals(an_offer())
    assert refusal.rule == "data_set.name"


@pytest.mark.parametrize("trust", ["central", "local", "distributed"])
def test_the_facts_of_an_offer_come_from_the_configuration(client_config: Raw, trust: str):
    client_config["privacy"] |= {"trust": trust, "sampling_rate": 1.0}
    client_config["federation"] = {"clients": 20}
    config = parse_config(client_config, where="x")
    offer = Offer.of(config, model=MODEL, submitter="alice", data_set="wards")
    assert (offer.method, offer.participants, offer.seeded) == ("ffa", 20, False)
    assert (offer.plan.trust.value, list(offer.purposes)) == (trust, ["training"])
    assert len(offer.purposes["training"]) == 3
    assert offer.opened == (18 if trust == "distributed" else 1)  # a tenth may drop out
    found = [refusal.rule for refusal in with_rule("plan.secure_aggregation", True).refusals(offer)]
    assert found == ([] if trust == "distributed" else ["plan.secure_aggregation"])
    assert len(with_rule("plan.min_opened", 19 if trust == "distributed" else 2).refusals(offer)) == 1
    client_config["run"]["insecure_seed"] = 1
    seeded = Offer.of(parse_config(client_config, where="x"), model=MODEL, submitter="alice", data_set="wards")
    assert [each.rule for each in with_rule("plan.allow_insecure_seed", False).refusals(seeded)] == ["plan.allow_insecure_seed"]


PLANS = [PLAIN, SCORED, GROUPED, replace(PLAIN, trust=Trust.LOCAL, sites=20), replace(PLAIN, sampler=PoissonSampler(0.1))]
offers = st.builds(
    an_offer,
    st.sampled_from(PLANS),
    method=st.sampled_from(["ffa", "fedavg"]),
    participants=st.integers(1, 5),
    opened=st.integers(1, 5),
    seeded=st.booleans(),
    submitter=st.sampled_from(["alice", "bob"]),
    data_set=st.sampled_from(["wards", "labs"]),
)


def some(*names: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high)


entries = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["wards", "labs"]),
        "purposes": some("training", "evaluation"),
        "epsilon": numbers(0.5, 20.0),
        "delta": numbers(1e-7, 1e-3),
    }
)
policies = st.fixed_dictionaries(
    {
        "data_set": st.lists(entries, max_size=2, unique_by=lambda entry: str(entry["name"])),
        "plan": st.fixed_dictionaries(
            {
                "max_epsilon": numbers(4.0, 10.0),
                "max_delta": numbers(1e-6, 1e-4),
                "min_noise_multiplier": numbers(0.5, 6.0),
                "min_participants": st.integers(1, 6),
                "min_opened": st.integers(1, 6),
                "units": some("client", "example"),
                "trusts": some("central", "local", "distributed"),
                "methods": some("ffa", "fedavg"),
                "models": some(MODEL, "ba" * 32),
                "secure_aggregation": st.booleans(),
                "allow_insecure_seed": st.booleans(),
            }
        ),
        "people": st.fixed_dictionaries({"submit": some("alice", "bob")}),
    }
)
ALL = {
    "units": ["client", "example"],
    "trusts": ["central", "local", "distributed"],
    "methods": ["ffa", "fedavg"],
    "models": [MODEL, "ba" * 32],
    "submit": ["alice", "bob"],
    "purposes": ["training", "evaluation"],
}


def loosened(section: Raw, key: str, draw: Any) -> None:
    """Make the rule `key` allow more."""
    value = section[key]
    if key in ALL:
        section[key] = value + draw([name for name in ALL[key] if name not in value])
    elif key.startswith("min_"):
        section[key] = 1 if isinstance(value, int) else value / 2
    elif key in ("secure_aggregation", "allow_insecure_seed"):
        section[key] = key == "allow_insecure_seed"
    else:
        section[key] = min(value * 1.7, 0.5) if "delta" in key else value * 1.7


@settings(deadline=None, max_examples=100)
@given(offers, policies, st.data())
def test_loosening_a_rule_never_adds_a_refusal(offer: Offer, raw: Raw, data: st.DataObject):
    strict, loose = SitePolicy.model_validate(raw), deepcopy(raw)
    names = [entry["name"] for entry in loose["data_set"]]
    choice = data.draw(st.sampled_from(["plan", "people", "entry", "new entry"]))
    if choice == "new entry" or (choice == "entry" and not names):
        new = data.draw(entries.filter(lambda entry: entry["name"] not in names)) if len(names) < 2 else None
        loose["data_set"] += [new] if new else []
    else:
        section = data.draw(st.sampled_from(loose["data_set"])) if choice == "entry" else loose[choice]
        key = data.draw(st.sampled_from([key for key in section if key != "name"]))
        loosened(section, key, lambda missing: data.draw(st.lists(st.sampled_from(missing), unique=True)) if missing else [])

    def kinds(policy: SitePolicy) -> Counter[str]:  # of a data set, one for each purpose: not listed, or too dear
        rules = [refusal.rule for refusal in policy.refusals(offer)]
        return Counter("data_set" if rule.startswith("data_set") else rule for rule in rules)

    assert not kinds(SitePolicy.model_validate(loose)) - kinds(strict)


def written(tmp_path: Path, raw: Raw) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path


def test_a_policy_is_read_from_its_file_and_the_example_in_its_documentation_is_one(tmp_path: Path):
    assert SitePolicy.load(written(tmp_path, a_policy())) == SitePolicy.model_validate(a_policy())
    example = (SitePolicy.__doc__ or "").split("```")[1].removeprefix("toml")
    (tmp_path / "example.toml").write_text(example, encoding="utf-8")
    assert SitePolicy.load(tmp_path / "example.toml").people.submit == ("alice",)


def test_a_site_without_a_policy_joins_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no policy at .*none\.toml, and a site without one joins nothing"):
        SitePolicy.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read the policy"):
        SitePolicy.load(tmp_path)
    for content in (b"", b"= 3", b"\xff"):
        (tmp_path / "p.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"p\.toml"):
            SitePolicy.load(tmp_path / "p.toml")


def places() -> list[tuple[str, Raw, Raw, str]]:
    """Every key of a policy with the section it is in: as named in errors, whole raw policy, section, key."""
    raw = a_policy()
    sections = {"": raw, "data_set.0.": raw["data_set"][0], "plan.": raw["plan"], "people.": raw["people"]}
    return [(f"{prefix}{key}", raw, section, key) for prefix, section in sections.items() for key in list(section)]


@pytest.mark.parametrize("number", range(len(places())), ids=[place[0] for place in places()])
def test_a_key_that_is_missing_unknown_or_of_another_type_is_named_with_its_file(number: int, tmp_path: Path):
    name, raw, section, key = places()[number]
    value = section[key]
    for wrong in ("yes", {"x": 1}, -1, True, [1]):
        if type(wrong) is not type(value) and not (wrong == -1 and name.endswith("insecure_seed")):
            section[key] = wrong
            with pytest.raises(ConfigError, match=rf"policy\.toml cannot be used[^:]*:\n  {name}"):
                SitePolicy.load(written(tmp_path, raw))
    del section[key]
    section[f"{key}x"] = value
    with pytest.raises(ConfigError) as caught:
        SitePolicy.load(written(tmp_path, raw))
    assert f"{name}x: unknown key" in str(caught.value)
    assert (f"{name}: missing" in str(caught.value)) == (key != "allow_insecure_seed")


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        *[("plan.max_epsilon", x) for x in (0.0, -1.0, inf, float("nan"))],
        *[("plan.max_delta", x) for x in (0.0, 1.0)],
        *[("plan.min_noise_multiplier", x) for x in (0.0, inf)],
        *[("plan.min_participants", x) for x in (0, 2.0)],
        ("plan.min_opened", 0),
        ("plan.units", ["patient"]),
        ("plan.trusts", ["nobody"]),
        ("plan.methods", [""]),
        *[("plan.models", [x]) for x in ("hf:organisation/model", MODEL.upper(), MODEL[1:], MODEL + "\n")],
    ],
)
def test_a_value_out_of_range_is_an_error(rule: str, value: object, tmp_path: Path):
    raw = a_policy()
    raw["plan"][rule.removeprefix("plan.")] = value
    with pytest.raises(ConfigError, match=rf"policy\.toml.*\n  {rule}"):
        SitePolicy.load(written(tmp_path, raw))


def test_two_budgets_for_one_purpose_are_an_error(tmp_path: Path):
    raw = a_policy()
    raw["data_set"].append({"name": "wards", "purposes": ["evaluation"], "epsilon": 2.0, "delta": DELTA})
    with pytest.raises(ConfigError, match=r'policy\.toml .*\n  data_set: "wards" has two budgets for "evaluation"'):
        SitePolicy.load(written(tmp_path, raw))
    raw["data_set"][0]["purposes"] = ["training"]
    assert len(SitePolicy.load(written(tmp_path, raw)).data_set) == 2


def test_the_ledgers_of_a_site_are_one_for_each_purpose_and_keep_their_budget_and_unit(tmp_path: Path):
    database, policy = tmp_path / "site.sqlite", SitePolicy.model_validate(a_policy())
    ledgers = policy.open_ledgers(database, an_offer(SCORED))
    assert {purpose: ledger.owner for purpose, ledger in ledgers.items()} == {
        "training": "wards / training",
        "evaluation": "wards / evaluation",
    }
    assert {ledger.budget for ledger in ledgers.values()} == {Budget(50.0, DELTA)}
    assert list(policy.open_ledgers(database, an_offer())) == ["training"]
    for epsilon in (60.0, 40.0):
        with pytest.raises(BudgetMismatch, match="wards / training"):
            with_rule("data_set.epsilon", epsilon).open_ledgers(database, an_offer())
    other = a_plan(budget=BUDGET, unit=type(PLAIN.unit)("example"))
    with pytest.raises(BudgetMismatch, match="wards / training"):
        policy.open_ledgers(database, an_offer(other))
    with pytest.raises(PolicyRefused, match=r"people\.submit"):
        policy.open_ledgers(tmp_path / "new.sqlite", an_offer(submitter="bob"))
    assert not (tmp_path / "new.sqlite").exists()


def test_the_id_of_a_model_changes_with_every_byte_and_name_of_its_files(tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    with pytest.raises(ModelError, match="holds no file"):
        model_id(folder)
    (folder / "a").write_bytes(b"1")
    (folder / "inner" / "b").write_bytes(b"2")
    ids = [model_id(folder)]
    (tmp_path / "link").symlink_to(folder)
    assert model_id(tmp_path / "link") == ids[0]
    (folder / "inner" / "b").write_bytes(b"3")
    ids.append(model_id(folder))
    (folder / "inner" / "b").rename(folder / "b")
    ids.append(model_id(folder))
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="cannot be read"):
        model_id(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d").write_bytes(b"4")
    ids += [model_id(folder), model_id(folder / "a")]
    assert len(set(ids)) == 5
    assert ids[-1] == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"  # SHA-256 of "1"
    with pytest.raises(ModelError, match="holds no file"):
        model_id(tmp_path / "none")


def check(*arguments: object) -> tuple[int, str]:
    result = RUNNER.invoke(cli.app, ["policy", "check", *(str(each) for each in arguments)])
    return result.exit_code, result.output


def test_the_command_says_what_a_site_would_answer(raw_config: Raw, tiny_model: Path, tmp_path: Path):
    assert "Example: dpfl policy check" in check("--help")[1]
    config, raw = tmp_path / "config.toml", a_policy()
    config.write_text(parse_config(raw_config, where="x").to_toml(), encoding="utf-8")
    raw["plan"] |= {"models": [model_id(tiny_model)], "min_participants": 4}
    policy = written(tmp_path, raw)
    assert check(policy, config) == (0, 'accepted: submitted by "alice", on "wards" for training\n')
    code, text = check(policy, config, "--json")
    answer = {"accepted": True, "submitter": "alice", "data_set": "wards", "model": model_id(tiny_model), "refusals": []}
    assert (code, json.loads(text)) == (0, answer)

    raw["plan"] |= {"min_participants": 5, "models": []}
    policy = written(tmp_path, raw)
    code, text = check(policy, config, "--submitter", "mallory", "--data-set", "labs")
    assert (code, text.count("\n  ")) == (1, 4)
    assert "  plan.min_participants: the number of participants is at least 5 here, and the run has 4\n" in text
    code, text = check(policy, config, "--json")
    assert code == 1
    assert [each["rule"] for each in json.loads(text)["refusals"]] == ["plan.min_participants", "plan.models"]
    assert json.loads(text)["refusals"][0]["asked"] == 4
