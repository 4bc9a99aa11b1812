"""Who takes part: secret, independent coins, and the event that such a sample earns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from dp_accounting import (
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from numpy.typing import NDArray

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError
from dp_federated_lora.privacy.accounting import DpEvent, SharedNoiseDpEvent
from dp_federated_lora.privacy.correlated import CorrelatedGaussian
from dp_federated_lora.privacy.participation import Participation
from dp_federated_lora.privacy.rng import SecureRandom


@final
@dataclass(frozen=True, slots=True)
class PoissonSampler:
    """Every unit takes part with probability q, independently, by a coin nobody else sees.

    The sampler alone wraps a mechanism's event in the amplification that it earns, so an accountant that
    assumes Poisson sampling cannot be combined with any other way of drawing.

    Args:
        sampling_rate: q in (0, 1]; public.
    """

    sampling_rate: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling_rate <= 1.0:
            raise IncompatiblePlan(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}")

    def draw(self, population: int, rng: SecureRandom) -> NDArray[np.int64]:
        """Indices of the units that take part, increasing; may be empty, and then the round runs all the same."""
        return np.flatnonzero(rng.bernoulli(self.sampling_rate, population)).astype(np.int64)

    def amplify(self, event: GaussianDpEvent | SharedNoiseDpEvent) -> DpEvent:
        """The event of the mechanism on a Poisson sample (Zhu and Wang 2019; Koskela et al. 2020)."""
        return event if self.sampling_rate == 1.0 else PoissonSampledDpEvent(self.sampling_rate, event)


def _subset(size: int, population: int, rng: SecureRandom) -> NDArray[np.int64]:
    """A uniform subset, increasing: those of the smallest keys, where all keys differ."""
    keys = rng.uint64(population)
    while len(np.unique(keys)) < population:
        keys = rng.uint64(population)
    return np.sort(np.argsort(keys)[:size])


def _require_population(sampler: TruncatedPoissonSampler | FixedSizeSampler, population: int) -> None:
    if population != sampler.population:
        raise PrivacyError(f"{population} units, but {sampler} was accounted for; nothing was drawn")


@final
@dataclass(frozen=True, slots=True)
class TruncatedPoissonSampler:
    """A Poisson sample, of which a uniform subset of `cap` units is kept if it is larger.

    The relation is zero-out: a unit's contribution becomes zero and `population`, an exact public number, stays.

    Args:
        sampling_rate: q in (0, 1]; public.
        cap: most units in a round.
        population: N >= cap.
    """

    sampling_rate: float
    cap: int
    population: int

    def __post_init__(self) -> None:
        if not (0.0 < self.sampling_rate <= 1.0 and 1 <= self.cap <= self.population):
            raise IncompatiblePlan(f"sampling_rate must lie in (0, 1] and cap in [1, population], got {self}")

    def draw(self, population: int, rng: SecureRandom) -> NDArray[np.int64]:
        """Indices of the units that take part, increasing, at most `cap`.

        Raises:
            PrivacyError: if the population is not the declared one.
        """
        _require_population(self, population)
        sample = PoissonSampler(self.sampling_rate).draw(population, rng)
        return sample if len(sample) <= self.cap else sample[_subset(self.cap, len(sample), rng)]

    def amplify(self, event: GaussianDpEvent) -> DpEvent:
        """The event of the mechanism on such a sample (arXiv 2508.15089)."""
        return TruncatedSubsampledGaussianDpEvent(self.population, self.sampling_rate, self.cap, event.noise_multiplier)


@final
@dataclass(frozen=True, slots=True)
class FixedSizeSampler:
    """A uniform cohort of exactly `cohort` units; the relation is replace-one and costs far more than Poisson sampling.

    Args:
        cohort: units in a round.
        population: N >= cohort, an exact public number.
    """

    cohort: int
    population: int

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise IncompatiblePlan(f"cohort must lie in [1, population], got {self}")

    def draw(self, population: int, rng: SecureRandom) -> NDArray[np.int64]:
        """Indices of the units that take part, increasing.

        Raises:
            PrivacyError: if the population is not the declared one.
        """
        _require_population(self, population)
        return _subset(self.cohort, population, rng)

    def amplify(self, event: GaussianDpEvent) -> DpEvent:
        """The event of the mechanism on such a cohort: replacing a unit moves the sum by 2 C, so its multiplier is halved."""
        return SampledWithoutReplacementDpEvent(self.population, self.cohort, GaussianDpEvent(event.noise_multiplier / 2.0))


@final
@dataclass(frozen=True, slots=True)
class CyclicPoissonSampler:
    """Unit i has its turn in every b-th round, by a public schedule; in its turn it takes part with probability q.

    Args:
        groups: b; group i mod b of units has its turn every b rounds.
        sampling_rate: q in (0, 1]; public. At 1 nothing is secret, and nothing is amplified.
    """

    groups: int
    sampling_rate: float

    def __post_init__(self) -> None:
        if not (self.groups >= 1 and 0.0 < self.sampling_rate <= 1.0):
            raise IncompatiblePlan(f"groups must be at least 1 and sampling_rate in (0, 1], got {self}")

    def participation(self, rounds: int) -> Participation:
        """How often a unit takes part at most."""
        return Participation(self.groups, -(-rounds // self.groups))

    def draw(self, units: Sequence[int], rng: SecureRandom, *, number: int) -> NDArray[np.int64]:
        """Positions in `units`, whose numbers depend on no other unit, of those that take part in round `number`."""
        turn = np.array(units, dtype=np.int64) % self.groups == (number - 1) % self.groups
        return np.flatnonzero(turn & rng.bernoulli(self.sampling_rate, len(units))).astype(np.int64)

    def amplify(self, mechanism: CorrelatedGaussian) -> DpEvent:
        """The event of the whole run: with coins one Poisson-sampled Gaussian for each turn (arXiv 2306.08153, Theorem 4).

        Raises:
            IncompatiblePlan: if the mechanism is for other turns, or with coins has more bands than there are groups.
        """
        if mechanism.participation != self.participation(mechanism.rounds):
            raise IncompatiblePlan(f"{mechanism.participation} is not that of {self}: take sampler.participation(rounds)")
        if self.sampling_rate == 1.0:
            return mechanism.event
        turn = PoissonSampler(self.sampling_rate).amplify(mechanism.turn_event)
        return SelfComposedDpEvent(turn, mechanism.participation.times(mechanism.rounds))
