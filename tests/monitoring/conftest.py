"""Reports and statement rows for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from dp_federated_lora.monitoring.statement import StatementRow


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """The shape of federated.round.RoundReport; monitoring knows reports by name and fields."""

    round: int
    rounds: int
    epsilon: float
    delta: float
    update_norm: float
    noise_norm: float
    clip_norm: float
    bytes_per_client: int
    public_metrics: Mapping[str, float]
    private_metrics: Mapping[str, float]


@pytest.fixture(scope="session")
def report() -> Callable[..., RoundReport]:
    def make(round_: int = 1, **changes: Any) -> RoundReport:
        fields: dict[str, Any] = {
            "round": round_,
            "rounds": 10,
            "epsilon": 0.25 * round_,
            "delta": 1e-5,
            "update_norm": 1.5,
            "noise_norm": 1.0,
            "clip_norm": 0.5,
            "bytes_per_client": 4096,
            "public_metrics": {},
            "private_metrics": {},
        }
        return RoundReport(**fields | changes)

    return make


@pytest.fixture(scope="session")
def row() -> Callable[..., StatementRow]:
    def make(**changes: Any) -> StatementRow:
        fields: dict[str, Any] = {
            "adversary": "recipients of the model",
            "unit": "client",
            "relation": "add or remove one",
            "epsilon": 2.0,
            "delta": 1e-5,
            "assumptions": ("the server is honest",),
        }
        return StatementRow(**fields | changes)

    return make
