"""trust = "distributed": participants add noise in shares, secure aggregation shows sums alone, and it costs what is charged."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dp_federated_lora import plan_run, train
from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.errors import ConfigError, IncompatiblePlan, RunInterrupted, SecureSumAborted
from dp_federated_lora.federated import Purpose, Request, RoundReport, Server, ServerState, Sites, noise_of, rotation_of
from dp_federated_lora.lab.attackers import scores_under_attack
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.ledgers import ledgers_at
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    GaussianMechanism,
    Ledger,
    PoissonSampler,
    PrivacyPlan,
    PrivacyUnit,
    SecureRandom,
    Trust,
    UnitId,
    clip_examples,
)
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.runtime.secure_sums import SecureSums
from dp_federated_lora.secagg import SharedNoise
from dp_federated_lora.vector import Layout
from plans import a_plan

Raw = dict[str, dict[str, object]]
D = 4000  # statistical bounds below are more than 6 standard errors wide: false positives under 1e-8


def distributed(raw: Raw, *, secure_sum: dict[str, object] | None = None, **run: object) -> Config:
    raw["privacy"]["trust"] = "distributed"
    raw["secure_sum"] = {"colluders": 0} | (secure_sum or {})
    raw["run"] |= run
    return parse_config(raw, where="test")


def shares(z: float = 1.5, **changes: object) -> SharedNoise:
    facts = {"bits": 24, "max_cohort": 40, "min_cohort": 36, "colluders": 4, "units": None}
    return SharedNoise(noise_multiplier=z, **(facts | changes))  # type: ignore[arg-type]


def a_distributed_plan(z: float = 1.5, *, noise: dict[str, object] | None = None, **changes: object) -> PrivacyPlan:
    return a_plan(trust=Trust.DISTRIBUTED, sites=40, mechanism=shares(z, **(noise or {})), **changes)


class Members:
    """An exchange of forty members that all hold one vector, in as many units each."""

    def __init__(self, plan: PrivacyPlan, value: Tensor, *, units: int = 1, dropout_rate: float = 0.0) -> None:
        self.plan, self.value, self.units = plan, value, units
        self.names = [f"c{i:02}" for i in range(40)]
        self.sums = SecureSums(self.names, dropout_rate=dropout_rate)
        self.sent: dict[str, Tensor] = {}
        self.took_part: list[str] = []

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        noise, charged = noise_of(self.plan, request.purpose)

        def contributions(_: bytes, names: Sequence[str]) -> Iterator[Tensor]:
            for name in names:
                permit, rng = sites[name]
                chosen = self.plan.draw(range(self.units), rng.derive("sample"), number=request.round).tolist()
                self.took_part += [name] * bool(chosen)
                units = [UnitId(f"{name}/{index}") for index in chosen]
                total = clip_examples(self.value[None].expand(len(chosen), -1), request.clip_norm, units)
                self.sent[name] = noise.release(total, charged=charged, permit=permit, rng=rng, rotation=rotation_of(request))
                yield self.sent[name]

        return self.sums.open(request, self.plan, {name: sites[name][1] for name in members}, contributions, size=size)


def one_round(tmp_path: Path, exchange: Members, *, seed: int = 1) -> Tensor:
    """The released sum of a round."""
    plan, key = exchange.plan, SecureRandom.insecure_from(seed)
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(D)}, Sgd(1.0).init(D), plan.clip_norm)
    ledger = Ledger.open(tmp_path / f"{seed}.sqlite", budget=plan.budget, owner="t")
    after, _ = server.run_round(state, server.reserve(state, ledger, key), exchange, key)
    assert ledger.spent().charges == 1
    return after.adapter["lora_B"].double() * plan.divisor


# --- the round --------------------------------------------------------------------------------------


def test_a_round_releases_the_clipped_sum_with_the_noise_of_all_shares(tmp_path: Path):
    value = torch.linspace(-1.0, 1.0, D)
    exchange = Members(a_distributed_plan(sampler=PoissonSampler(1.0)), value)
    noise = one_round(tmp_path, exchange) - 40 * value * 2.0 / value.norm()
    std = 1.5 * 2.0 * math.sqrt(40 / 32)  # z x clip norm, of forty shares where 32 are counted on
    assert abs(float(noise.std()) / std - 1) < 6.5 / math.sqrt(2 * D)
    assert abs(float(noise.mean())) < 6.5 * std / math.sqrt(D)
    assert exchange.plan.noise_norm(D, 2.0) == pytest.approx(std * math.sqrt(D) / 50.0)
    assert exchange.plan.noise_price == pytest.approx(math.sqrt(40 / 32))


def test_units_of_one_client_are_added_without_loss_and_the_noise_is_that_of_one_unit(tmp_path: Path):
    value = torch.linspace(-1.0, 1.0, D)
    plan = a_distributed_plan(sampler=PoissonSampler(1.0), unit=PrivacyUnit.EXAMPLE, noise={"units": 1000})
    noise = one_round(tmp_path, Members(plan, value, units=20)) - 800 * value * 2.0 / value.norm()
    std = 1.5 * 2.0 * math.sqrt(40 / 32)
    assert abs(float(noise.std()) / std - 1) < 6.5 / math.sqrt(2 * D)
    assert abs(float(noise.mean())) < 6.5 * std / math.sqrt(D)


def test_everybody_takes_part_in_the_sum_and_a_coin_of_its_own_decides_whether_with_data(tmp_path: Path):
    exchange = Members(a_distributed_plan(0.5, rounds=1), torch.ones(D))
    released = one_round(tmp_path, exchange)
    assert set(exchange.sent) == set(exchange.names)
    assert 0 < len(exchange.took_part) < 40  # half of forty; all or none with probability 2^-39
    towards = float(released.sum()) / math.sqrt(D) / 2.0
    assert abs(towards - len(exchange.took_part)) < 6.5 * 0.5 * math.sqrt(40 / 32)


def test_who_drops_out_takes_data_and_share_along_and_enough_noise_is_left(tmp_path: Path):
    exchange = Members(a_distributed_plan(sampler=PoissonSampler(1.0)), torch.zeros(D), dropout_rate=0.05)
    noise = one_round(tmp_path, exchange)
    std = 1.5 * 2.0
    assert std * (1 - 6.5 / math.sqrt(2 * D)) < float(noise.std()) < std * math.sqrt(40 / 32) * (1 + 6.5 / math.sqrt(2 * D))


def test_too_few_survivors_open_nothing_and_the_charge_stays(tmp_path: Path):
    plan, key = a_distributed_plan(), SecureRandom.insecure_from(1)
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(D)}, Sgd(1.0).init(D), plan.clip_norm)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    permit = server.reserve(state, ledger, key)
    with pytest.raises(SecureSumAborted, match="36"):
        server.run_round(state, permit, Members(plan, torch.ones(D), dropout_rate=0.5), key)
    assert (ledger.spent().charges, ledger.spent().released) == (1, 0)


def test_what_a_member_hands_over_is_bound_to_its_permit_and_to_the_planned_noise(tmp_path: Path):
    plan, key = a_distributed_plan(), SecureRandom.insecure_from(1)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    permit = ledger.reserve(plan.event, round=1, purpose="training", commitment=key.commitment)
    total = clip_examples(torch.ones(1, 8), 2.0, [UnitId("u")])
    noise, charged = noise_of(plan, Purpose.TRAINING)
    release = {"charged": charged, "permit": permit, "rng": key, "rotation": bytes(32)}
    with pytest.raises(Exception, match="one plan yields both"):
        shares(1.0).release(total, **release)
    assert noise.release(total, **release).shape == (8,)
    with pytest.raises(Exception, match="bought its release"):
        noise.release(total, **release)
    with pytest.raises(IncompatiblePlan, match="before a sum is seen"):
        plan.release(total, {}, permit=permit, rng=key)


def test_noise_in_shares_and_distributed_trust_belong_together():
    with pytest.raises(IncompatiblePlan, match="belong together"):
        a_plan(trust=Trust.DISTRIBUTED, sites=40, mechanism=GaussianMechanism(1.5))
    with pytest.raises(IncompatiblePlan, match="belong together"):
        a_plan(mechanism=shares())
    with pytest.raises(IncompatiblePlan, match="no noise in shares"):
        noise_of(a_plan(), Purpose.TRAINING)
    with pytest.raises(IncompatiblePlan, match="no noise in shares"):
        noise_of(a_distributed_plan(), Purpose.EVALUATION)


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_trains_and_its_statement_holds_against_the_server(unit: str, request: pytest.FixtureRequest):
    raw = request.getfixturevalue("raw_config" if unit == "example" else "client_config")
    result = train(distributed(raw))
    assert {row.adversary: row.epsilon for row in result.statement} == dict.fromkeys(
        ("recipients of the model", "other participants", "the server"), result.epsilon
    )
    assert result.epsilon <= 8.0
    assert all("secure aggregation" in " ".join(row.assumptions) for row in result.statement)
    assert "malicious" in " ".join(result.statement[-1].assumptions)
    assert "participants, in shares under secure aggregation" in (result.path / "report.html").read_text()


def test_a_distributed_run_is_the_central_one_but_for_its_noise(raw_config: Raw, tmp_path: Path):
    """With the same coins and an epsilon so large that noise is small, both end at nearly the same adapter."""
    raw_config["privacy"] |= {"allow_weak_privacy": True, "epsilon": 300.0, "sampling_rate": 1.0, "rounds": 2}
    raw_config["run"]["insecure_seed"] = 1
    central = parse_config(raw_config, where="test")
    first = train(central, out=tmp_path / "central")
    second = train(distributed(raw_config), out=tmp_path / "distributed")

    def adapter(path: Path) -> Tensor:
        from safetensors.torch import load_file

        tensors = load_file(path / "adapter" / "adapter_model.safetensors") | load_file(path / "adapter" / "head.safetensors")
        return torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_A" not in name])

    one, other = adapter(first.path), adapter(second.path)
    assert float(one.norm()) > 0.5
    noise = [4.0 * math.sqrt(2) * plan_run(config).noise_norm for config in (central, distributed(raw_config))]
    assert float((one - other).norm()) < 1.5 * math.hypot(*noise) < 0.3 * float(one.norm())


def test_dropouts_by_configuration_leave_a_run_whole_and_repeatable(raw_config: Raw, tmp_path: Path):
    raw_config["federation"] |= {"clients": 12, "partition": "iid", "dropout_rate": 0.1}
    config = distributed(raw_config, secure_sum={"dropouts": 0.4}, insecure_seed=3)
    runs = [train(config, out=tmp_path / name) for name in ("one", "two")]
    written = [(run.path / "adapter" / "head.safetensors").read_bytes() for run in runs]
    assert written[0] == written[1]
    assert runs[0].rounds == 4


def test_an_aborted_sum_is_charged_and_begun_anew_until_the_budget_ends(raw_config: Raw, tmp_path: Path):
    raw_config["federation"] |= {"clients": 12, "partition": "iid", "dropout_rate": 0.12}
    result = train(distributed(raw_config, secure_sum={"dropouts": 0.1}, insecure_seed=5))
    (ledger,) = ledgers_at(str(result.path), None)
    spend = ledger.spent()
    assert 0 < result.rounds < 4 == spend.charges  # some sums were aborted
    assert spend.released == result.rounds
    assert "budget" in (result.stopped or "")
    log = (result.path / "run.log").read_text()
    assert "secure sum aborted" in log


def test_a_run_killed_in_a_secure_sum_ends_as_the_undisturbed_one(raw_config: Raw, tmp_path: Path):
    raw_config["federation"] |= {"clients": 8, "partition": "iid", "dropout_rate": 0.05}
    config = distributed(raw_config, secure_sum={"dropouts": 0.3}, insecure_seed=3)

    def stop(report: RoundReport) -> None:
        if report.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(config, out=tmp_path / "stopped", on_round=stop)
    resumed = train(resume=tmp_path / "stopped")
    files = [(run.path / "adapter" / "head.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]


def test_scores_on_held_out_data_are_secure_sums_too(client_config: Raw):
    client_config["federation"] = {"clients": 12, "partition": "iid"}
    client_config["evaluation"] = {"epsilon": 1.0, "every": 1, "holdout": 0.3}
    reports: list[RoundReport] = []
    result = train(distributed(client_config), on_round=reports.append)
    assert result.epsilon <= 8.0
    assert all({"accuracy", "loss", "units"} <= report.private_metrics.keys() for report in reports)


def test_a_robust_rule_sees_secure_sums_of_groups_and_liars_change_one(raw_config: Raw):
    raw_config["federation"] |= {"clients": 12, "partition": "iid"}
    raw_config["robust"] = {"rule": "median", "byzantine": 1, "groups": 3}
    config = distributed(raw_config, insecure_seed=1)
    assert plan_run(config).as_json()["groups"] == 3
    assert scores_under_attack(config, attack="sign_flip", liars=1)["accuracy"] >= 0.0
    assert train(config).rounds == 4


def test_an_adaptive_clip_norm_follows_what_the_sum_released(client_config: Raw):
    client_config["federation"] = {"clients": 40, "partition": "iid"}
    client_config["privacy"] |= {"clip_quantile": 0.5, "epsilon": 10.0}
    reports: list[RoundReport] = []
    train(distributed(client_config), on_round=reports.append)
    assert len({report.clip_norm for report in reports}) == 3


def test_what_does_not_go_with_distributed_trust_is_refused_with_a_reason(raw_config: Raw):
    def refused(match: str, section: str, **changes: object) -> None:
        raw = {name: dict(values) for name, values in raw_config.items()}
        raw.setdefault(section, {}).update(changes)
        with pytest.raises(ConfigError, match=match):
            distributed(raw)

    refused("one adapter to start from", "federation", max_staleness=1)
    refused("computed alone", "run", stack_tokens=64)
    refused("no sum", "method", name="flora")
    refused("another trust", "privacy", correlated={"separation": 2, "bands": 2})
    raw_config["privacy"]["trust"] = "central"
    raw_config["federation"]["dropout_rate"] = 0.1
    with pytest.raises(ConfigError, match='belong to privacy.trust = "distributed"'):
        parse_config(raw_config, where="test")
    del raw_config["federation"]["dropout_rate"]
    raw_config["privacy"]["trust"] = "distributed"
    raw_config["secure_sum"] = {"colluders": 3}
    with pytest.raises(ConfigError, match="at least 5 must be"):
        parse_config(raw_config, where="test")


def test_another_number_of_members_than_planned_is_refused(raw_config: Raw):
    config = distributed(raw_config)
    plan, bench = privacy_plan(config), Workbench.of(config)
    clients = bench.clients(plan)
    server, state = bench.server(plan)
    simulator = Simulator(clients[:3], bench.learner)
    request = Request(Purpose.TRAINING, 1, plan.content_id, state.adapter, 1.0)
    streams = {client.name: (None, SecureRandom.insecure_from(n)) for n, client in enumerate(clients[:3])}
    with pytest.raises(SecureSumAborted, match="3 members of a sum that is planned for 4"):
        simulator.opened(request, streams, list(streams), size=8)  # type: ignore[arg-type]
    assert server.plan is plan
    assert replace(plan) == plan
