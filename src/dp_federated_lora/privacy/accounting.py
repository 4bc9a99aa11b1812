"""What a sequence of events costs: pessimistic PLD composition, a second accountant, and calibration.

Everything is for the add-or-remove-one relation, with which zero-out composes: for these events both have the same PLD.
The exception is a cohort of fixed size: only a Renyi bound for replace-one is known for it, so it composes with nothing
else. dp-accounting's accountants disagree about the sensitivity of replace-one (RDP keeps it, PLD doubles it); here the
event of the sampler has it doubled. Of noise in shares only Renyi divergences are known, too, but for the common relation:
whatever it is composed with is then counted by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, final

import numpy as np
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from numpy.typing import NDArray
from scipy.optimize import brentq

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError, UnsupportedEvent

__all__ = (
    "Composition",
    "DpEvent",
    "calibrate_noise_multiplier",
    "epsilon_rdp",
    "event_from_json",
    "event_to_json",
)

# Coarser than dp-accounting's 1e-4. The estimate stays an upper bound (connect-the-dots, Doroshenko et al. 2022), costs
# about 1e-4 of epsilon, and makes one more round tens of milliseconds instead of seconds.
_INTERVAL: Final = 1e-3
# Calibration aims this much below the target: composing round by round and in one go differ by FFT rounding.
_SAFETY: Final = 1e-5
# Less noise protects nobody (one plain release at 1/16 costs epsilon 195), and its discretised distribution fills the memory.
LEAST_NOISE: Final = 1.0 / 16.0
# The same for many releases: q T / z^2 is about twice what T plain releases cost.
_MOST: Final = 4096.0
# Renyi orders for cohorts of fixed size: any set gives a bound, and more of them than these only take time.
_ORDERS: Final = (*(1.0 + x / 10.0 for x in range(1, 10)), *range(2, 64))
_INTEGER_ORDERS: Final = range(2, 513)


@final
@dataclass(frozen=True, slots=True)
class SharedNoiseDpEvent(DpEvent):  # type: ignore[misc]
    """A sum with noise in shares: its Renyi divergences at integer orders to 4,096 are at most those of a Gaussian.

    With Poisson sampling too, as the binomial sum for them (Mironov et al. 2019, arXiv 1908.10530) grows in each.

    Args:
        noise_multiplier: z of that Gaussian.
    """

    noise_multiplier: float


# The closed table: names of JSON objects, and their keys in the order of the event's own fields.
_TABLE: Final[Mapping[str, tuple[Any, tuple[str, ...]]]] = {
    "none": (NoOpDpEvent, ()),
    "gaussian": (GaussianDpEvent, ("noise_multiplier",)),
    "shared_noise": (SharedNoiseDpEvent, ("noise_multiplier",)),
    "poisson": (PoissonSampledDpEvent, ("sampling_rate", "of")),
    "truncated_poisson": (TruncatedSubsampledGaussianDpEvent, ("population", "sampling_rate", "cap", "noise_multiplier")),
    "fixed_size": (SampledWithoutReplacementDpEvent, ("population", "cohort", "of")),
    "repeated": (SelfComposedDpEvent, ("of", "count")),
}


def gaussian_parts(event: DpEvent) -> tuple[float, float]:
    """Sampling probability and noise multiplier, on a clipped sum, of an event that is one Gaussian release.

    Raises:
        UnsupportedEvent: for any other event or impossible parameters.
    """
    rate, z = 1.0, math.nan
    match event:
        case GaussianDpEvent() | SharedNoiseDpEvent():
            z = event.noise_multiplier
        case PoissonSampledDpEvent(event=GaussianDpEvent() | SharedNoiseDpEvent()):
            rate, z = event.sampling_probability, event.event.noise_multiplier
        case SampledWithoutReplacementDpEvent(event=GaussianDpEvent()) if event.source_dataset_size > 0:
            rate, z = event.sample_size / event.source_dataset_size, 2.0 * event.event.noise_multiplier
        case TruncatedSubsampledGaussianDpEvent() if 1 <= event.truncated_batch_size <= event.dataset_size:
            rate, z = event.sampling_probability, event.noise_multiplier
    if not (0.0 < rate <= 1.0 and math.isfinite(z) and z >= LEAST_NOISE):
        raise UnsupportedEvent(
            f"{event} is not an event this accountant knows, or not one with 0 < q <= 1 and a finite noise multiplier of at "
            f"least {LEAST_NOISE:g}; nothing was charged"
        )
    return float(rate), float(z)


def has_shared_noise(event: DpEvent) -> bool:
    """Whether the noise comes in shares, so that only Renyi divergences are known."""
    return isinstance(getattr(event, "event", event), SharedNoiseDpEvent)


@lru_cache(maxsize=256)
def divergences(event: DpEvent, orders: range = _INTEGER_ORDERS) -> NDArray[np.float64]:
    """Renyi divergences of one Gaussian or shared-noise event, sampled or not, at integer orders."""
    rate, z = gaussian_parts(event)
    gaussian = GaussianDpEvent(z) if rate == 1.0 else PoissonSampledDpEvent(rate, GaussianDpEvent(z))
    accountant = RdpAccountant(orders, NeighboringRelation.ADD_OR_REMOVE_ONE)
    return np.asarray(accountant.compose(gaussian).rdp, dtype=np.float64)


def repeated(event: DpEvent) -> tuple[DpEvent, int]:
    """The event that a `SelfComposedDpEvent` repeats and how often; any other event happens once."""
    return (event.event, event.count) if isinstance(event, SelfComposedDpEvent) else (event, 1)


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """A JSON object that `event_from_json` reads back.

    Raises:
        UnsupportedEvent: if the event is not in the closed table.
    """
    once, count = repeated(event)
    if not isinstance(once, NoOpDpEvent):
        gaussian_parts(once if count >= 1 else event)
    name, keys = next((name, keys) for name, (kind, keys) in _TABLE.items() if isinstance(event, kind))
    values = (getattr(event, attribute) for attribute in event.__match_args__)
    return {"event": name, **{k: event_to_json(v) if isinstance(v, DpEvent) else v for k, v in zip(keys, values, strict=True)}}


def event_from_json(data: Any) -> DpEvent:
    """The event that `event_to_json` wrote.

    Raises:
        UnsupportedEvent: if it is malformed or not in the closed table.
    """
    try:
        kind, keys = _TABLE[data["event"]]
        event = kind(*(event_from_json(data[key]) if key == "of" else data[key] for key in keys))
        event_to_json(event)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedEvent(f"{data!r} is not a privacy event this version can read") from error
    return event


@lru_cache(maxsize=64)
def _pld(event: DpEvent) -> Any:
    rate, z = gaussian_parts(event)
    if isinstance(event, TruncatedSubsampledGaussianDpEvent):  # arXiv 2508.15089
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            event.dataset_size, rate, event.truncated_batch_size, z, value_discretization_interval=_INTERVAL
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        z, sampling_prob=rate, value_discretization_interval=_INTERVAL, pessimistic_estimate=True
    )


@final
class Composition:
    """Running composition of events; epsilon is a pessimistic bound (Koskela et al. 2020, arXiv 1906.03049).

    As a filter it is valid for schedules fixed in advance, which a `PrivacyPlan` is; parameters chosen from outputs
    need an RDP or zCDP filter (arXiv 2602.06756).
    """

    def __init__(self) -> None:
        self._pld: Any = None
        self._renyi = False
        self._counts: Mapping[DpEvent, int] = {}

    def add(self, event: DpEvent, count: int = 1) -> None:
        """Compose `count` more executions of `event`.

        Raises:
            UnsupportedEvent: if the event is not in the closed table, or of another neighbouring relation than those before.
            IncompatiblePlan: if so many releases at so little noise protect nobody.
        """
        event, times = repeated(event)
        count *= times
        if count < 1:
            raise PrivacyError(f"an event happens at least once, got {count}")
        if isinstance(event, NoOpDpEvent):
            return
        if _protects_nobody(*gaussian_parts(event), count):
            raise IncompatiblePlan(
                f"{count} releases of {event} cost an epsilon beyond any claim, which protects nobody: raise the noise "
                "multiplier (by a lower epsilon), or lower the rounds"
            )
        counts = {**self._counts, event: self._counts.get(event, 0) + count}
        renyi = self._renyi or isinstance(event, SampledWithoutReplacementDpEvent) or has_shared_noise(event)
        if renyi:
            _require_renyi(counts)
        self._renyi, self._counts = renyi, counts
        if renyi:
            return
        part = _pld(event)
        part = part.self_compose(count) if count > 1 else part
        self._pld = part if self._pld is None else self._pld.compose(part)

    def with_event(self, event: DpEvent) -> Composition:
        """A copy with one more execution of `event`; this one stays as it is."""
        extended = Composition()
        extended._pld, extended._renyi, extended._counts = self._pld, self._renyi, self._counts
        extended.add(event)
        return extended

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon that the bound shows at `delta`; 0 for no event, infinity where none is shown."""
        if self._renyi:
            return epsilon_rdp(self._counts.items(), delta)
        return 0.0 if self._pld is None else float(self._pld.get_epsilon_for_delta(delta))


def _protects_nobody(rate: float, z: float, count: int) -> bool:
    return count * rate > _MOST * z * z


def epsilon_rdp(events: Iterable[tuple[DpEvent, int]], delta: float) -> float:
    """Epsilon by Renyi DP (Mironov 2017), the second opinion: never below what the PLD shows.

    Raises:
        UnsupportedEvent: if an event has no Renyi bound, or events are of different neighbouring relations.
    """
    counts = dict(events)
    relation = _require_renyi(counts)
    if any(has_shared_noise(event) for event in counts):
        total = sum(count * divergences(event) for event, count in counts.items())
        return float(compute_epsilon(_INTEGER_ORDERS, total, delta)[0])
    accountant = RdpAccountant(_ORDERS if relation is NeighboringRelation.REPLACE_ONE else None, relation)
    for event, count in counts.items():
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def _require_renyi(events: Iterable[DpEvent]) -> NeighboringRelation:
    """The one relation under which all of `events` have a Renyi bound; raises UnsupportedEvent if there is none."""
    events = list(events)
    replace_one = any(isinstance(event, SampledWithoutReplacementDpEvent) for event in events)
    relation = NeighboringRelation.REPLACE_ONE if replace_one else NeighboringRelation.ADD_OR_REMOVE_ONE
    for event in events:
        event_to_json(event)
        of_its_own = isinstance(event, SampledWithoutReplacementDpEvent)
        if of_its_own != replace_one or isinstance(event, TruncatedSubsampledGaussianDpEvent):
            raise UnsupportedEvent(
                f"{event} has no Renyi bound under {relation.name} and cannot be composed with what was charged before: cohorts "
                "of fixed size are accounted for under replace-one, capped ones by PLD alone; nothing was charged"
            )
    return relation


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    rounds: int,
    beside: tuple[tuple[DpEvent, int], ...] = (),
    shared: bool = False,
) -> float:
    """Least noise multiplier (relative tolerance 1e-4, from above) whose `rounds` rounds cost at most `epsilon`.

    Args:
        epsilon: target.
        delta: at which it holds.
        sampling_rate: q of Poisson sampling.
        rounds: number of releases.
        beside: other events and how often they happen, within the same target.
        shared: whether noise comes in shares.

    Raises:
        PrivacyError: if no noise multiplier up to 10,000 reaches the target.
        IncompatiblePlan: if one below `LEAST_NOISE` would.
    """
    target = epsilon * (1.0 - _SAFETY)

    def cost(z: float) -> float:
        return _cost(sampling_rate, z, rounds, delta, beside, shared=shared)

    low, high = 0.5, 1.0
    while cost(high) > target:
        low, high = high, 2.0 * high
        if high > 1e4:
            raise PrivacyError(
                f"no noise multiplier up to 10,000 gives epsilon {epsilon:g} over {rounds} rounds at sampling rate "
                f"{sampling_rate:g}{' beside the evaluations' if beside else ''}: raise epsilon, or lower rounds or sampling rate"
            )
    while cost(low) <= target:
        low, high = low / 2.0, low
        if low < LEAST_NOISE:
            raise IncompatiblePlan(
                f"epsilon {epsilon:g} over {rounds} rounds at sampling rate {sampling_rate:g} asks for a noise multiplier below "
                f"{high:g}, which protects nobody: lower epsilon, or raise sampling rate or rounds"
            )
    root = brentq(lambda z: cost(z) - target, low, high, rtol=5e-5)
    while cost(root) > target:  # the root finder may end on either side
        root *= 1.0 + 5e-5
    return float(root)


@lru_cache(maxsize=64)
def calibrate_sampling_rate(*, epsilon: float, delta: float, noise_multiplier: float, rounds: int) -> float:
    """Greatest q in (0, 1] (relative tolerance 1e-4, from below) whose `rounds` rounds cost at most `epsilon`.

    Raises:
        PrivacyError: if even q = 1e-6 costs more.
    """
    target = epsilon * (1.0 - _SAFETY)
    if _cost(1.0, noise_multiplier, rounds, delta) <= target:
        return 1.0
    low = 1e-6
    if _cost(low, noise_multiplier, rounds, delta) > target:
        raise PrivacyError(f"at noise multiplier {noise_multiplier:g} no sampling rate keeps {rounds} rounds within {epsilon:g}")
    q = brentq(lambda rate: _cost(rate, noise_multiplier, rounds, delta) - target, low, 1.0, rtol=5e-5)
    while _cost(q, noise_multiplier, rounds, delta) > target:
        q *= 1.0 - 5e-5
    return float(q)


@lru_cache(maxsize=1024)  # root finders ask for the ends of their interval again
def _cost(
    rate: float, z: float, rounds: int, delta: float, beside: tuple[tuple[DpEvent, int], ...] = (), *, shared: bool = False
) -> float:
    """Epsilon of `rounds` Poisson-sampled releases and what happens beside them; 1e9 stands for too much."""
    if _protects_nobody(rate, z, rounds):
        return 1e9  # finite, for the root finder
    gaussian = SharedNoiseDpEvent(z) if shared else GaussianDpEvent(z)
    composition = Composition()
    composition.add(gaussian if rate == 1.0 else PoissonSampledDpEvent(rate, gaussian), rounds)
    for event, count in beside:
        composition.add(event, count)
    return composition.epsilon(delta)
