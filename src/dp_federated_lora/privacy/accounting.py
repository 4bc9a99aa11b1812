"""What a sequence of events costs: pessimistic PLD composition, a second accountant, and calibration.

Everything here is for the add-or-remove-one relation. dp-accounting's accountants disagree about replace-one
(RDP keeps the sensitivity, PLD doubles it), so that relation is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, final

from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from dp_federated_lora.errors import PrivacyError, UnsupportedEvent

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


def gaussian_parts(event: DpEvent) -> tuple[float, float]:
    """Sampling probability and noise multiplier of a supported event; the closed table of this accountant.

    Raises:
        UnsupportedEvent: for any other event or impossible parameters.
    """
    rate, inner = 1.0, event
    if isinstance(event, PoissonSampledDpEvent):
        rate, inner = event.sampling_probability, event.event
    if not isinstance(inner, GaussianDpEvent):
        raise UnsupportedEvent(f"{event} is not an event this accountant knows; nothing was charged")
    z = inner.noise_multiplier
    if not (0.0 < rate <= 1.0 and math.isfinite(z) and z > 0.0):
        raise UnsupportedEvent(f"{event} has impossible parameters: 0 < q <= 1 and a positive, finite noise multiplier")
    return float(rate), float(z)


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """A JSON object that `event_from_json` reads back.

    Raises:
        UnsupportedEvent: if the event is not in the closed table.
    """
    rate, z = gaussian_parts(event)
    gaussian = {"event": "gaussian", "noise_multiplier": z}
    return gaussian if rate == 1.0 else {"event": "poisson", "sampling_rate": rate, "of": gaussian}


def _gaussian_from(data: Mapping[str, Any]) -> DpEvent:
    return GaussianDpEvent(float(data["noise_multiplier"]))


def _poisson_from(data: Mapping[str, Any]) -> DpEvent:
    return PoissonSampledDpEvent(float(data["sampling_rate"]), _gaussian_from(data["of"]))


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], DpEvent]]] = {
    "gaussian": _gaussian_from,
    "poisson": _poisson_from,
}


def event_from_json(data: Any) -> DpEvent:
    """The event that `event_to_json` wrote.

    Raises:
        UnsupportedEvent: if it is malformed or not in the closed table.
    """
    try:
        event = _READERS[data["event"]](data)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedEvent(f"{data!r} is not a privacy event this version can read") from error
    gaussian_parts(event)
    return event


@lru_cache(maxsize=64)
def _pld(rate: float, z: float) -> Any:
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

    def add(self, event: DpEvent, count: int = 1) -> None:
        """Compose `count` more executions of `event`.

        Raises:
            UnsupportedEvent: if the event is not in the closed table.
        """
        if count < 1:
            raise PrivacyError(f"an event happens at least once, got {count}")
        part = _pld(*gaussian_parts(event))
        part = part.self_compose(count) if count > 1 else part
        self._pld = part if self._pld is None else self._pld.compose(part)

    def with_event(self, event: DpEvent) -> Composition:
        """A copy with one more execution of `event`; this one stays as it is."""
        extended = Composition()
        extended._pld = self._pld
        extended.add(event)
        return extended

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon that the bound shows at `delta`; 0 for no event, infinity where none is shown."""
        return 0.0 if self._pld is None else float(self._pld.get_epsilon_for_delta(delta))


def epsilon_rdp(events: Iterable[tuple[DpEvent, int]], delta: float) -> float:
    """Epsilon by Renyi DP (Mironov 2017), the second opinion: never below what the PLD shows."""
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in events:
        gaussian_parts(event)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    *, epsilon: float, delta: float, sampling_rate: float, rounds: int, beside: tuple[tuple[DpEvent, int], ...] = ()
) -> float:
    """Least noise multiplier (relative tolerance 1e-4, from above) whose `rounds` rounds cost at most `epsilon`.

    Args:
        epsilon: target.
        delta: at which it holds.
        sampling_rate: q of Poisson sampling.
        rounds: number of releases.
        beside: other events and how often they happen, within the same target.

    Raises:
        PrivacyError: if no noise multiplier up to 10,000 reaches the target.
    """
    target = epsilon * (1.0 - _SAFETY)

    def cost(z: float) -> float:
        return _cost(sampling_rate, z, rounds, delta, beside)

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


def _cost(rate: float, z: float, rounds: int, delta: float, beside: tuple[tuple[DpEvent, int], ...] = ()) -> float:
    """Epsilon of `rounds` Poisson-sampled Gaussians and what happens beside them."""
    gaussian = GaussianDpEvent(z)
    composition = Composition()
    composition.add(gaussian if rate == 1.0 else PoissonSampledDpEvent(rate, gaussian), rounds)
    for event, count in beside:
        composition.add(event, count)
    return composition.epsilon(delta)
