"""SCAFFOLD without a release of its own, on quadratics whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dp_federated_lora.aggregation import CONTROL, HEAD_ALONE, LENGTH, LinearMethod, Scaffold, Sgd, control_after
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.federated import Client, ClientMemory, Purpose, Request, Server, handle
from dp_federated_lora.lora import AdaptedModel, Task
from dp_federated_lora.privacy import Budget, Ledger, PoissonSampler, PrivacyPlan, SecureRandom
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import LocalSteps
from plans import a_plan

CURVES = {"steep": (10, 1), "flat": (1, -1)}  # f_k(w) = a / 2 (w - b)^2 in both coordinates
OPTIMUM = (10 * 1 - 1 * 1) / 11
STEPS = LocalSteps(steps=10, batch_size=1, learning_rate=0.05)


class Quadratics:
    """A learner whose examples (a, b) are functions a / 2 |w - b|^2."""

    threads = 1

    def __init__(self) -> None:
        module = nn.Module()
        module.head = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})
        self.model = AdaptedModel(module, None, Task.CLASSIFICATION, 1)

    def spread(self, work: Callable[[Quadratics, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return (work(self, item) for item in items)

    def batches(self, examples: Examples, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        yield indices

    def losses(self, examples: Examples, batch: Sequence[int]) -> Tensor:
        w = self.model.module.head["w"]
        return torch.stack([a / 2 * (w - b).square().sum() for a, b in (examples.tokens[i] for i in batch)])


def run(folder: Path, plan: PrivacyPlan, local: LocalSteps) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """w, c and all c_k after the plan's rounds."""
    learner, memory, method = Quadratics(), ClientMemory(folder / "clients"), LinearMethod("quadratic", HEAD_ALONE)
    clients = [
        Client(name, Examples((curve,), None), plan, method, local, Examples((), None), memory=memory)
        for name, curve in CURVES.items()
    ]
    memory.rewind(list(CURVES), 0)
    optimizer = Scaffold(Sgd(1.0), plan.divisor / len(clients)) if local.control else Sgd(1.0)
    server, state = Server.of(learner.model, plan, method, optimizer, local=local)  # type: ignore[arg-type]
    ledger = Ledger.open(folder / "l.sqlite", budget=plan.budget, owner="t")
    for number in range(plan.rounds):
        key = SecureRandom.insecure_from(3).derive(number)
        permit = server.reserve(state, ledger, key)
        state, _ = server.run_round(state, permit, Simulator(clients, learner), key)  # type: ignore[arg-type]
        ledger.commit(permit.serial)
    own = [memory.before(name, plan.rounds + 1).get("head.w", torch.zeros(2)) for name in CURVES]
    return state.adapter["head.w"], state.optimizer.get(CONTROL), own


def without_noise(monkeypatch: pytest.MonkeyPatch, **changes: object) -> PrivacyPlan:
    monkeypatch.setattr(SecureRandom, "rounded_gaussian", lambda self, sigma, n: torch.zeros(n, dtype=torch.int64).numpy())
    facts = {"sampler": PoissonSampler(1.0), "divisor": 2.0, "rounds": 40, "clip_norm": 8.0, "budget": Budget(1e3, 1e-5)}
    return a_plan(**(facts | changes))


def test_where_clients_differ_averaging_drifts_and_control_variates_find_the_optimum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plan = without_noise(monkeypatch)
    (tmp_path / "plain").mkdir()
    drifted, none, _ = run(tmp_path / "plain", plan, STEPS)
    pulls = [1 - (1 - 0.05 * a) ** 10 for a, _ in CURVES.values()]  # the share of its way that each client goes
    expected = (pulls[0] - pulls[1]) / sum(pulls)
    assert torch.allclose(drifted, torch.full((2,), expected), atol=1e-4)
    assert abs(expected - OPTIMUM) > 0.3
    assert none is None
    found, common, own = run(tmp_path, plan, replace(STEPS, control=True))
    assert torch.allclose(found, torch.full((2,), OPTIMUM), atol=2e-3)
    # Rounding to the lattice is all that sets c and the mean of c_k apart: 2^-22 clip norms a round, over K eta.
    assert common is not None
    assert torch.allclose(common, sum(own) / 2, atol=40 * 8.0 * 2**-22 / STEPS.length * 1.01, rtol=0)
    gradients = [a * (OPTIMUM - b) for a, b in CURVES.values()]
    assert torch.allclose(torch.stack(own)[:, 0], torch.tensor(gradients, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_control_variates_follow_a_falling_step_size_and_clipped_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule: str
):
    plan = without_noise(monkeypatch, clip_norm=0.25)
    local = replace(STEPS, control=True, schedule=schedule, rounds=60)
    found, common, own = run(tmp_path, plan, local)
    assert torch.allclose(found, torch.full((2,), OPTIMUM), atol=0.02)
    shortest = local.in_round(40).length
    assert common is not None
    assert torch.allclose(common, sum(own) / 2, atol=40 * 0.25 * 2**-22 / shortest * 1.01, rtol=0)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_with_everybody_and_no_noise_c_is_the_mean_of_all_c_k(clients: int, rounds: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    own = [torch.zeros(5, dtype=torch.float64) for _ in range(clients)]
    server = Scaffold(Sgd(1.0), share=1.0)
    state = server.init(5)
    for number in range(rounds):
        length = 0.1 + number
        common = state[CONTROL]
        changes = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in own]
        own = [control_after(c, common, change, length) for c, change in zip(own, changes, strict=True)]
        before = {**state, LENGTH: torch.full((5,), length, dtype=torch.float64)}
        step, state = server.update(sum(changes) / clients, before)
        assert torch.allclose(step, sum(changes) / clients)
        assert set(state) == {"velocity", CONTROL}
    assert torch.allclose(state[CONTROL], sum(own) / clients, atol=1e-12, rtol=0)


def test_a_client_keeps_its_mean_gradient_as_in_option_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # One round from zero: c_k = (x - y_k) / (K eta), the mean of the K gradients on the way.
    _, _, own = run(tmp_path, without_noise(monkeypatch, rounds=1), replace(STEPS, control=True))
    for c, (a, b) in zip(own, CURVES.values(), strict=True):
        way = [b * (1 - (1 - 0.05 * a) ** step) for step in range(10)]
        assert float(c[0]) == pytest.approx(sum(a * (w - b) for w in way) / 10, rel=1e-5)


def test_an_update_that_is_no_number_leaves_the_state_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plan = without_noise(monkeypatch, rounds=1)
    monkeypatch.setitem(CURVES, "steep", (math.nan, 1))
    found, _, own = run(tmp_path, plan, replace(STEPS, control=True))
    assert torch.isfinite(found).all()
    assert not own[0].any()
    assert own[1].any()


def test_a_server_that_sends_no_control_variates_is_noticed(tmp_path: Path):
    plan, learner, memory = a_plan(), Quadratics(), ClientMemory(tmp_path / "clients")
    memory.rewind(["steep"], 0)
    nothing, steps = Examples((), None), replace(STEPS, control=True)
    client = Client("steep", nothing, plan, LinearMethod("quadratic", HEAD_ALONE), steps, nothing, memory=memory)
    request = Request(Purpose.TRAINING, 1, plan.content_id, learner.model.state(), plan.clip_norm)
    with pytest.raises(IncompatiblePlan, match="the server needs a Scaffold optimiser"):
        handle(request, client, learner, SecureRandom.insecure_from(0))  # type: ignore[arg-type]


def test_local_steps_follow_their_schedule():
    line = replace(STEPS, schedule="linear", rounds=5, steps_end=5)
    assert [line.in_round(n).learning_rate for n in range(1, 6)] == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])
    assert [line.in_round(n).steps for n in range(1, 6)] == [10, 9, 8, 7, 6]
    curve = replace(STEPS, schedule="cosine", rounds=4)
    assert [curve.in_round(n).learning_rate / 0.05 for n in (1, 2, 3, 4)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert curve.in_round(3).length == pytest.approx(10 * 0.025)
    assert STEPS.in_round(99) == STEPS
