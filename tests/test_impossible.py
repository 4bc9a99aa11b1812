"""Compositions that would break a guarantee: each must raise, and each error names the broken rule by its class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dp_accounting
import pytest
import torch

from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    ConfigError,
    DuplicateContribution,
    IncompatiblePlan,
    LedgerKeyLost,
    PermitMismatch,
    PermitSpent,
    PrivacyError,
    RoundAlreadyReleased,
    UnsupportedEvent,
)
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.privacy import (
    BoundedSum,
    Budget,
    Composition,
    DpEvent,
    GaussianMechanism,
    Ledger,
    Permit,
    PoissonSampler,
    Scope,
    SecureRandom,
    UnitId,
    clip_to,
    event_from_json,
)

MECHANISM = GaussianMechanism(1.0)
Raw = dict[str, dict[str, object]]


class Bench:
    """A ledger, a sum and a key to misuse."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        self.ledger = Ledger.open(self.path, budget=Budget(6.0, 1e-5), owner="t")
        self.key = SecureRandom.insecure_from(1)

    def contribution(self, *, unit: str = "a", clip_norm: float = 1.0, value: float = 1.0):
        return clip_to(torch.full((3,), value), clip_norm, UnitId(unit))

    def sum(self, **changes) -> BoundedSum:
        return BoundedSum.collect([self.contribution(**changes)], size=3, clip_norm=changes.get("clip_norm", 1.0))

    def permit(self, event: DpEvent = MECHANISM.event, *, number: int = 1, key: SecureRandom | None = None) -> Permit:
        return self.ledger.reserve(event, round=number, purpose="training", commitment=(key or self.key).commitment)

    def release(self, permit: Permit | object, mechanism: GaussianMechanism = MECHANISM, charged: DpEvent = MECHANISM.event):
        return mechanism.release(self.sum(), charged=charged, permit=permit, rng=self.key)  # type: ignore[arg-type]

    def release_twice(self):
        permit = self.permit()
        self.release(permit)
        self.release(permit)

    def release_a_published_round_again(self):
        self.ledger.commit(self.permit().serial)
        self.permit(key=SecureRandom.insecure_from(2))

    def charge_without_key(self):
        self.path.with_suffix(".key").unlink()
        self.ledger = Ledger.open(self.path, budget=Budget(6.0, 1e-5), owner="t")
        self.permit()


def overspend(bench: Bench):
    bench.permit()
    bench.permit(number=2, key=SecureRandom.insecure_from(2))


IMPOSSIBLE: dict[str, tuple[type[Exception], Callable[[Bench], object]]] = {
    "scale after clipping": (TypeError, lambda b: b.contribution() * 2.0),
    "weigh a client": (TypeError, lambda b: 0.3 * b.sum()),
    "average over replies": (TypeError, lambda b: b.sum() / 3),
    "count replies": (TypeError, lambda b: len(b.sum())),
    "save an un-noised value": (Exception, lambda b: torch.save(b.sum(), b.path.parent / "x.pt")),
    "print an un-noised value": (TypeError, lambda b: f"{b.sum():.3f}"),
    "release without a charge": (TypeError, lambda b: MECHANISM.release(b.sum(), charged=MECHANISM.event, rng=b.key)),
    "release under a forged permit": (Exception, lambda b: b.release(Permit(object(), 0, 1, MECHANISM.event, b.key.commitment))),
    "release under a cheaper charge": (PermitMismatch, lambda b: b.release(b.permit(GaussianMechanism(9.0).event))),
    "add less noise than charged": (PermitMismatch, lambda b: b.release(b.permit(), GaussianMechanism(0.5))),
    "charge amplified, release in full": (
        PermitMismatch,
        lambda b: b.release(b.permit(PoissonSampler(0.1).amplify(MECHANISM.event))),
    ),
    "release twice": (PermitSpent, Bench.release_twice),
    "release a published round again": (RoundAlreadyReleased, Bench.release_a_published_round_again),
    "use the same noise in two rounds": (
        PrivacyError,
        lambda b: [b.permit(GaussianMechanism(9.0).event, number=n) for n in (1, 2)],
    ),
    "overspend": (BudgetExhausted, overspend),
    "raise the budget by reopening": (BudgetMismatch, lambda b: Ledger.open(b.path, budget=Budget(9.0, 1e-5), owner="t")),
    "turn a run's budget into a lifetime's": (
        BudgetMismatch,
        lambda b: Ledger.open_all(b.path, ["t"], budget=Budget(6.0, 1e-5), scope=Scope.LIFETIME),
    ),
    "charge without the ledger's key": (LedgerKeyLost, Bench.charge_without_key),
    "charge one participant for two": (
        PrivacyError,
        lambda b: Ledger.open_all(b.path, ["anna", "anna"], budget=Budget(6.0, 1e-5), scope=Scope.LIFETIME),
    ),
    "one unit twice in a sum": (DuplicateContribution, lambda b: BoundedSum.merge([b.sum(), b.sum()], size=3, clip_norm=1.0)),
    "two clip norms in a sum": (
        PrivacyError,
        lambda b: BoundedSum.merge([b.sum(), b.sum(unit="b", clip_norm=2.0)], size=3, clip_norm=1.0),
    ),
    "two shapes in a sum": (PrivacyError, lambda b: BoundedSum.merge([b.sum()], size=4, clip_norm=1.0)),
    "account for a sampler that is not there": (
        UnsupportedEvent,
        lambda b: Composition().add(
            dp_accounting.SampledWithReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1.0)),  # type: ignore[arg-type]
        ),
    ),
    "code in a ledger or message": (PrivacyError, lambda b: event_from_json({"kind": "os.system", "noise_multiplier": 1.0})),
    "no noise": (IncompatiblePlan, lambda b: GaussianMechanism(0.0)),
    "a sampling rate above one": (IncompatiblePlan, lambda b: PoissonSampler(1.5)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_this_composition_is_impossible(name: str, tmp_path: Path):
    error, attempt = IMPOSSIBLE[name]
    bench = Bench(tmp_path)
    with pytest.raises(error):
        attempt(bench)


CONFIGURATIONS: dict[str, tuple[str, str, object, str]] = {
    "a weak epsilon": ("privacy", "epsilon", 11.0, "privacy.epsilon"),
    "a weak delta": ("privacy", "delta", 1e-4, "privacy.delta"),
    "a method that is no sum": ("method", "name", "flora", "method.name"),
    "an unknown method": ("method", "name", "best", "method.name"),
    "a trust level that is not there": ("privacy", "trust", "nobody", "privacy.trust"),
    "no population": ("privacy", "population", None, "privacy.population"),
    "private scores": ("data", "test_is_public", False, "data.test_is_public"),
    "local steps with one noised step a round": ("training", "local_steps", 3, "training.local_"),
    "an adapter that is never trained": ("training", "head_rounds", 4, "training.head_rounds"),
    "a lifetime budget without a data set": ("ledger", "database", "x.sqlite", "ledger.data_set"),
    "an unknown key": ("privacy", "epsilom", 3.0, "privacy.epsilom"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_this_configuration_is_refused_before_any_work_and_names_its_key(name: str, raw_config: Raw):
    section, key, value, named = CONFIGURATIONS[name]
    raw_config.setdefault(section, {})[key] = value
    if value is None:
        del raw_config[section][key]
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        parse_config(raw_config, where="my.toml")
