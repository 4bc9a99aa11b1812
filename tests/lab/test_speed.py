"""`dpfl bench` on a small model: every figure is there, positive, and torch's threads are as before."""

from __future__ import annotations

import re

import pytest
import torch

from dp_federated_lora.lab import speed
from dp_federated_lora.privacy import PrivacyUnit


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import models  # noqa: PLC0415

    class OneBlock(models.bert.BertConfig):
        def __init__(self, **changes: object) -> None:
            super().__init__(**changes | {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 48})

    monkeypatch.setattr("transformers.BertConfig", OneBlock)
    for name, value in (("NOISE", 1024), ("UPDATES", 6), ("UPDATE_SIZE", 64)):
        monkeypatch.setattr(speed, name, value)


@pytest.mark.usefixtures("small")
def test_every_figure_is_measured_and_threads_stay_as_they_were():
    before = torch.get_num_threads()
    figures = dict(speed.speed_figures(repetitions=1))
    assert torch.get_num_threads() == before
    assert len(figures) == 10
    assert all(float(re.match(r"[\d.]+", result)[0]) >= 0 for result in figures.values())
    assert "  with frozen weights in bfloat16" in figures


def test_medians_leave_out_the_first_call_and_take_turns():
    calls: list[str] = []
    ticks = iter([0, 0, *(t for n in (1, 5, 3) for _ in "ab" for t in (0, n))])
    found = speed.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, clock=lambda: next(ticks))
    assert found == {"a": 3, "b": 3}
    assert calls == ["a", "b"] * 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("unit", list(PrivacyUnit))
def test_random_clients_have_different_examples_and_agree_to_one_plan(unit: PrivacyUnit):
    clients = speed.random_clients(unit, 3, 2, 5)
    assert len({client.examples.tokens for client in clients}) == 3
    assert len({client.plan.content_id for client in clients}) == 1
    assert all((client.local is None) == (unit is PrivacyUnit.EXAMPLE) for client in clients)
