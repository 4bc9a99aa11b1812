"""Sketches: the map itself, what it makes of a round, and whole runs; statistical tests have a false-positive rate below 1e-6."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora import plan_run, train
from dp_federated_lora.aggregation import FFA, Sgd, Sketch
from dp_federated_lora.audit import Transcript
from dp_federated_lora.errors import AuditError, ConfigError, PrivacyError
from dp_federated_lora.federated import Purpose, Request, Server, ServerState, handle
from dp_federated_lora.lab.attackers import scores_under_attack
from dp_federated_lora.lab.auditing import audit
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import BoundedSum, Ledger, SecureRandom, UnitId, clip_to
from dp_federated_lora.vector import Layout
from plans import a_plan

Raw = dict[str, dict[str, object]]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.floats(1.0, 80.0), st.integers(0, 2**40), st.integers(1, 10**6))
def test_a_sketch_is_one_sign_for_each_coordinate_in_equally_full_buckets(d: int, ratio: float, seed: int, number: int):
    sketch = Sketch(ratio, seed)
    matrix = sketch.encode(torch.eye(d, dtype=torch.float64), number).T
    assert matrix.shape == (sketch.size(d), d)
    assert torch.equal(matrix.abs().sum(dim=0), torch.ones(d, dtype=torch.float64))
    loads = matrix.abs().sum(dim=1)
    assert loads.min() >= d // sketch.size(d) and loads.max() <= math.ceil(d / sketch.size(d)) <= math.ceil(ratio)
    # It is that matrix for any rows at all, and decoding is its transpose: so the sketch of a sum is the sum of sketches.
    rows = normal(3, d)
    assert torch.allclose(sketch.encode(rows, number), rows @ matrix.T, atol=1e-12)
    assert torch.equal(sketch.decode(rows[0, : len(matrix)], d, number), matrix.T @ rows[0, : len(matrix)])


def test_rounds_have_sketches_of_their_own_and_errors_average_out():
    d, ratio, rounds = 24, 4.0, 4000
    sketch, x = Sketch(ratio, 3), normal(24)
    decoded = torch.stack([sketch.decode(sketch.encode(x[None], n)[0], d, n) for n in range(1, rounds + 1)])
    errors = decoded - x
    assert (errors.mean(dim=0).abs() <= 6 * errors.std(dim=0) / math.sqrt(rounds)).all()
    squares = errors.square().sum(dim=1) / x.square().sum()
    assert abs(float(squares.mean()) - (ratio - 1)) < 6 * float(squares.std()) / math.sqrt(rounds)
    norms = torch.stack([sketch.encode(x[None], n)[0].square().sum() for n in range(1, rounds + 1)]) / x.square().sum()
    assert abs(float(norms.mean()) - 1.0) < 6 * float(norms.std()) / math.sqrt(rounds)
    assert torch.equal(sketch.encode(x[None], 5), Sketch(ratio, 3).encode(x[None], 5))


class Senders:
    """A hundred clients that send one vector, or none."""

    def __init__(self, sent: torch.Tensor | None, size: int) -> None:
        self.sent, self.size, self.count = sent, size, 0
        self.names = [f"c{i}" for i in range(100)]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        self.count = len(clients)
        for index in clients if self.sent is not None else ():
            yield BoundedSum.collect([clip_to(self.sent, 2.0, UnitId(self.names[index]))], size=self.size, clip_norm=2.0)


def test_the_server_decodes_the_released_mean_and_its_noise_is_as_large_as_without_a_sketch(tmp_path: Path):
    d, sketch = 2000, Sketch(4.0, 7)
    x = 0.01 * normal(d)
    server = Server(plan=a_plan(), method=replace(FFA, sketch=sketch), optimizer=Sgd(1.0), layout=Layout((("lora_B", (d,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(d)}, Sgd(1.0).init(d), 2.0)
    steps, norms = [], []
    for name, sent in (("everybody", sketch.encode(x[None], 1)[0]), ("nobody", None)):
        exchange, key = Senders(sent, 500), SecureRandom.insecure_from(1)  # one key: one cohort and one noise
        ledger = Ledger.open(tmp_path / f"{name}.sqlite", budget=a_plan().budget, owner="t")
        after, norm = server.run_round(state, server.reserve(state, ledger, key), exchange, key)
        steps.append(after.adapter["lora_B"].double())
        norms.append(norm)
    signal = exchange.count / 50.0 * sketch.decode(sketch.encode(x[None], 1)[0], d, 1)
    assert torch.allclose(steps[0] - steps[1], signal, atol=1e-5)
    report = server.report(after, ledger, update_norm=norms[1], clip_norm=2.0, scores={})
    assert norms[1] == pytest.approx(float(steps[1].norm()), rel=1e-6)
    assert abs(norms[1] / report.noise_norm - 1.0) < 6 / math.sqrt(2 * 500)  # 500 independent noises, four times each
    assert report.bytes_per_client == 4 * (d + 500)


@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_a_client_sends_is_short_and_clipped_after_the_sketch(unit: str, request: pytest.FixtureRequest):
    raw: Raw = request.getfixturevalue("raw_config" if unit == "example" else "client_config")
    raw["compression"] = {"ratio": 5.0}
    config = parse_config(raw, where="test")
    plan, bench = privacy_plan(config), Workbench.of(config)
    message = Request(Purpose.TRAINING, 1, plan.content_id, bench.model.state(), 1.0)
    total = handle(message, bench.clients(plan)[0], bench.learner, SecureRandom.insecure_from(1))
    d = Layout.of(bench.model.parameters(bench.method.factors)).size
    assert total.clip_norm == 1.0
    BoundedSum.merge([total], size=math.ceil(d / 5.0), clip_norm=1.0)
    with pytest.raises(PrivacyError, match="shape"):
        BoundedSum.merge([total], size=d, clip_norm=1.0)


@pytest.mark.parametrize("changes", [{}, {"clip_quantile": 0.5}, {"trust": "local"}, {"unit": "client"}])
def test_runs_with_a_sketch_say_what_is_sent(changes: dict[str, object], request: pytest.FixtureRequest):
    raw: Raw = request.getfixturevalue("client_config" if "unit" in changes else "raw_config")
    plain = plan_run(parse_config(raw, where="test"))
    raw["privacy"] |= changes
    raw["compression"] = {"ratio": 3.0}
    raw["training"]["head_rounds"] = 1
    config = parse_config(raw, where="test")
    planned, reports = plan_run(config), []
    train(config, on_round=reports.append)
    d = planned.trainable_parameters
    assert (plain.bytes_per_client_round, planned.bytes_per_client_round) == (8 * d, 4 * (d + math.ceil(d / 3.0)))
    assert reports[-1].bytes_per_client == planned.bytes_per_client_round > reports[0].bytes_per_client


def test_an_audit_sends_sketched_canaries_and_a_replay_says_that_it_cannot_measure_them(raw_config: Raw, tmp_path: Path):
    raw_config["compression"] = {"ratio": 3.0}
    raw_config["run"]["insecure_seed"] = 1
    config = parse_config(raw_config, where="test")
    verdict = audit(config, out=tmp_path / "audit", canaries=40).verdict
    assert verdict.passed
    bench = Workbench.of(config)
    server, _ = Server.of(bench.model, privacy_plan(config), bench.method, Sgd(1.0))
    with pytest.raises(AuditError, match="compression"):
        Transcript().wrap(Senders(None, 1), server)


def test_what_cannot_be_compressed_is_refused(raw_config: Raw):
    for ratio in (1.0, 0.5, math.inf):
        raw_config["compression"] = {"ratio": ratio}
        with pytest.raises(ConfigError, match=r"compression\.ratio"):
            parse_config(raw_config, where="test")
    raw_config["compression"] = {"ratio": 2.0}
    raw_config["privacy"] |= {"correlated": {"bands": 2, "separation": 2}, "sampling_rate": 1.0}
    with pytest.raises(ConfigError, match=r"\[compression\]"):
        parse_config(raw_config, where="test")


@pytest.mark.parametrize(
    "change",
    [
        {"robust": {"clip_around_aggregate": True}},
        {"federation": {"ranks": [{"rank": 2, "clients": 4}]}},
        {"method": {"name": "flora"}, "privacy": {"trust": "local"}},
        {
            "privacy": {"unit": "client", "population": None},
            "training": {"local_steps": 2, "local_batch_size": 8, "local_learning_rate": 0.5, "local_control": "scaffold"},
        },
    ],
)
def test_what_works_on_single_coordinates_is_not_combined_with_a_sketch(raw_config: Raw, change: Raw):
    raw = raw_config | {name: raw_config.get(name, {}) | section for name, section in change.items()}
    parse_config(raw, where="test")
    with pytest.raises(ConfigError, match="compression: a sketch mixes coordinates"):
        parse_config(raw | {"compression": {"ratio": 2.0}}, where="test")


def test_liars_send_sketches_too(client_config: Raw):
    client_config["compression"] = {"ratio": 2.0}
    config = parse_config(client_config, where="test")
    assert scores_under_attack(config, attack="sign_flip", liars=1)["accuracy"] >= 0.0
