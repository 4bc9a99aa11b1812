"""The clip norm that follows a quantile: its price, its bound, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.federated import Request, Server, ServerState
from dp_federated_lora.lab import load_config, train
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.monitoring.metrics import read_metrics
from dp_federated_lora.privacy import AdaptiveClip, BoundedSum, GaussianMechanism, Ledger, PoissonSampler, SecureRandom, UnitId
from dp_federated_lora.vector import Layout
from plans import a_plan


def adaptive(bit_noise: float = 5.0, quantile: float = 0.5) -> AdaptiveClip:
    return AdaptiveClip(quantile=quantile, learning_rate=0.2, bit_noise=bit_noise)


@pytest.mark.parametrize(("z", "cohort", "expected"), [(1.0, 100, 1.0050378), (1.0, 20, 1.1547005), (0.8, 1000, 0.8000256)])
def test_the_noise_multiplier_on_the_vector_is_that_of_the_paper(z: float, cohort: int, expected: float):
    clip = adaptive(cohort / 20)
    noise_on_vector = z * clip.sensitivity(3.0, z)  # one release with multiplier z and sensitivity K
    assert noise_on_vector / 3.0 == pytest.approx(expected, abs=1e-7)
    noise_on_bits = noise_on_vector / (2 * clip.sensitivity(3.0, z) * clip.share(z))  # a bit is +-1/2 of this coordinate
    assert noise_on_bits == pytest.approx(clip.bit_noise)


def test_a_bit_that_costs_more_than_the_round_is_refused():
    with pytest.raises(IncompatiblePlan, match="raise the cohort"):
        a_plan(adaptive_clip=adaptive(bit_noise=0.75))  # z = 1.5 = 2 sigma_b
    for wrong in ({"quantile": 0.0}, {"quantile": 1.0}, {"learning_rate": 0.0}, {"bit_noise": -1.0}):
        with pytest.raises(IncompatiblePlan):
            AdaptiveClip(**({"quantile": 0.5, "learning_rate": 0.2, "bit_noise": 5.0} | wrong))


def test_the_step_is_that_of_the_paper():
    clip = adaptive(5.0)
    half_bit = clip.sensitivity(1.0, 1.0) * clip.share(1.0)
    assert clip.following(1.0, half_bit, 1.0) == pytest.approx(math.exp(-0.1))  # all unclipped
    assert clip.following(1.0, -half_bit, 1.0) == pytest.approx(math.exp(0.1))  # all clipped
    assert clip.following(1.0, 100 * half_bit, 1.0) == pytest.approx(math.exp(-0.1))  # noise beyond [0, 1] is cut off
    assert clip.following(1.0, 0.0, 1.0) == 1.0


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=6),
    st.floats(0.01, 100.0),
    st.floats(0.1, 3.0),
)
def test_vector_and_bit_together_never_exceed_the_sensitivity(values: list[float], clip_norm: float, z: float):
    clip = adaptive(bit_noise=2.0)
    rows = torch.tensor([values])
    total = clip.clip(rows, clip_norm, z, [UnitId("a")])
    lattice = [int(v) for v in total._value]
    assert len(lattice) == len(values) + 1
    assert sum(v * v for v in lattice) <= 4**22
    assert total.clip_norm == clip.sensitivity(clip_norm, z)
    if not all(math.isfinite(v) for v in values):
        assert lattice == [0] * len(lattice)
    else:
        assert (lattice[-1] > 0) == (math.sqrt(sum(v * v for v in values)) <= clip_norm)


class Norms:
    """Clients whose updates have norms 1, 2, ..., 100."""

    names = tuple(f"c{i}" for i in range(100))

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        for index in clients:
            row = torch.zeros(1, 4)
            row[0, index % 4] = index + 1.0
            yield self.plan.clip(row, request.clip_norm, [UnitId(self.names[index])])


@pytest.mark.parametrize(("start", "quantile"), [(10.0, 0.5), (300.0, 0.5), (20.0, 0.9)])
def test_it_reaches_the_quantile_from_both_sides(tmp_path: Path, start: float, quantile: float):
    plan = a_plan(
        adaptive_clip=adaptive(5.0, quantile),
        sampler=PoissonSampler(1.0),
        mechanism=GaussianMechanism(1.0),
        divisor=100.0,
        rounds=50,
        clip_norm=start,
        budget=a_plan().budget.__class__(1000.0, 1e-5),
    )
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (4,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(4)}, Sgd(1.0).init(4), plan.clip_norm)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    norms = []
    for number in range(50):
        key = SecureRandom.insecure_from(number)
        permit = server.reserve(state, ledger, key)
        state, _ = server.run_round(state, permit, Norms(plan), key)
        ledger.commit(permit.serial)
        norms.append(state.clip_norm)
    # A seeded run, so no false positive; noise moves the share of unclipped units by 0.05 a round, the clip norm by 1 per cent.
    assert sum(norms[-8:]) / 8 == pytest.approx(100 * quantile, rel=0.1)
    assert ledger.spent().epsilon == pytest.approx(plan.epsilon_after(50))  # the bit costs nothing beyond the round


def test_a_run_adapts_its_clip_norm_and_a_resumed_one_continues_from_it(raw_config: dict[str, dict[str, object]]):
    raw_config["privacy"] |= {"clip_quantile": 0.5, "clip_norm": 5.0}
    config = parse_config(raw_config, where="test")

    def stop(report):
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_round=stop)
    result = train(resume=config.run.out)
    clip_norms = [line["clip_norm"] for line in read_metrics(result.path / "metrics.jsonl")]
    assert clip_norms[0] == 5.0
    assert all(b < a for a, b in zip(clip_norms, clip_norms[1:], strict=False))  # gradients are far below 5
    assert load_config(result.path / "config.toml").privacy.clip_quantile == 0.5
