"""The one object that yields sampler, clip norm, mechanism, divisor, events and the privacy statement."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import accumulate
from typing import Self, final

import numpy as np
from dp_accounting import NoOpDpEvent
from numpy.typing import NDArray
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError
from dp_federated_lora.privacy.accounting import Composition, DpEvent, calibrate_noise_multiplier
from dp_federated_lora.privacy.bounded import BoundedSum, Released, UnitId
from dp_federated_lora.privacy.clipping import AdaptiveClip, clip_examples
from dp_federated_lora.privacy.correlated import CorrelatedGaussian, Correlation
from dp_federated_lora.privacy.evaluation import PrivateEvaluation
from dp_federated_lora.privacy.ledger import Budget, Spend
from dp_federated_lora.privacy.mechanisms import GaussianMechanism, NoiseShares
from dp_federated_lora.privacy.participation import Participation
from dp_federated_lora.privacy.permits import Permit
from dp_federated_lora.privacy.personal import Tier
from dp_federated_lora.privacy.rng import SecureRandom
from dp_federated_lora.privacy.sampling import CyclicPoissonSampler, PoissonSampler


class PrivacyUnit(Enum):
    """What one 'unit' of the guarantee is: one training example, or everything a client holds."""

    EXAMPLE = "example"
    CLIENT = "client"


class Trust(Enum):
    """Who adds the noise: the server, on the sum (CENTRAL), or participants: all of it each (LOCAL), or a share (DISTRIBUTED)."""

    CENTRAL = "central"
    LOCAL = "local"
    DISTRIBUTED = "distributed"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """Public facts from which both accounting and execution follow; a change of any changes `content_id`.

    Args:
        unit: what is protected.
        trust: who adds noise.
        sampler: who takes part in a round.
        clip_norm: C, the L2 bound of one unit's contribution to a round; the first one where it adapts.
        mechanism: noise on the sum, on each site's, or in shares; correlated over rounds for a sampler by turns only.
        rounds: T.
        divisor: public constant by which the noised sum is divided: the expected cohort of the declared population.
        budget: the ceiling that the ledger enforces.
        adaptive_clip: how the clip norm follows the data, inside what a round costs; None keeps it.
        evaluation: scores on held-out private data, charged to the same budget; None for none.
        tiers: groups of units with declared budgets of their own, in the order of participants; empty where all have `budget`.
        sites: public number of participants that add noise, of the full size (LOCAL) or a share; 1 where the server adds it.

    Raises:
        IncompatiblePlan: if a field is out of range or the rounds cannot fit the budget.
    """

    unit: PrivacyUnit
    trust: Trust
    sampler: PoissonSampler | CyclicPoissonSampler
    clip_norm: float
    mechanism: GaussianMechanism | CorrelatedGaussian | NoiseShares
    rounds: int
    divisor: float
    budget: Budget
    adaptive_clip: AdaptiveClip | None = None
    evaluation: PrivateEvaluation | None = None
    tiers: tuple[Tier, ...] = ()
    sites: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise IncompatiblePlan(f"rounds must be at least 1, got {self.rounds}")
        for name, value in (("clip_norm", self.clip_norm), ("divisor", self.divisor)):
            if not (math.isfinite(value) and value > 0):
                raise IncompatiblePlan(f"{name} must be a positive public constant, got {value}")
        if self.sites < 1 or (self.trust is Trust.CENTRAL and self.sites > 1):
            raise IncompatiblePlan(f"under trust = {self.trust.value} noise is added at {self.sites} sites: impossible")
        if self.trust is Trust.LOCAL and self.adaptive_clip is not None:
            raise IncompatiblePlan("an adaptive clip norm is planned for one noise on the count of bits; use a fixed clip norm")
        if isinstance(self.mechanism, NoiseShares) != (self.trust is Trust.DISTRIBUTED):
            raise IncompatiblePlan(f"noise in shares and trust = distributed belong together, got {self.mechanism}")
        self.sensitivity(self.clip_norm)
        planned = self.epsilon_after(self.rounds)
        if planned > self.budget.epsilon:
            raise IncompatiblePlan(
                f"{self.rounds} rounds at noise multiplier {self.mechanism.noise_multiplier:.4g} cost epsilon "
                f"{planned:.4g}, more than the budget {self.budget.epsilon:.4g}: raise the noise or lower the rounds"
            )
        if isinstance(self.mechanism, CorrelatedGaussian):
            if (self.mechanism.rounds, self.mechanism.clip_norm) != (self.rounds, self.clip_norm):
                raise IncompatiblePlan(f"{self.mechanism} is not for {self.rounds} rounds of clip norm {self.clip_norm}")
            if self.tiers or self.adaptive_clip is not None or self.trust is not Trust.CENTRAL:
                raise IncompatiblePlan(
                    "correlated noise needs one sum and one clip norm: no groups, adaptation or noise elsewhere"
                )
        self._require_tiers()

    def _require_tiers(self) -> None:
        if self.tiers and (self.adaptive_clip is not None or self.evaluation is not None or self.trust is Trust.DISTRIBUTED):
            raise IncompatiblePlan("budgets of groups are planned for training with a fixed clip norm and whole noise alone")
        for tier in self.tiers:
            if (spent := self.epsilon_of(tier, self.rounds)) > tier.budget.epsilon:
                raise IncompatiblePlan(f"{self.rounds} rounds cost a unit of {tier} epsilon {spent:.4g}")
        if self.tiers and self.event not in [self.event_of(tier) for tier in self.tiers]:
            raise IncompatiblePlan("the ledger of the run is charged for its dearest group, and no group has the plan's event")

    @classmethod
    def calibrated(
        cls,
        *,
        unit: PrivacyUnit,
        trust: Trust = Trust.CENTRAL,
        sites: int = 1,
        budget: Budget,
        population: int,
        sampling_rate: float,
        rounds: int,
        clip_norm: float,
        adaptive_clip: AdaptiveClip | None = None,
        evaluation: PrivateEvaluation | None = None,
        groups: tuple[float, tuple[Tier, ...]] | None = None,
        correlation: tuple[Correlation, int] | None = None,
        shares: Callable[[float], NoiseShares] | None = None,
    ) -> Self:
        """The plan with the least noise that keeps `rounds` rounds within `budget`.

        Args:
            unit: what is protected.
            trust: who adds noise; its amount is the same, but under LOCAL each of `sites` adds it.
            sites: number of participants under LOCAL and DISTRIBUTED.
            budget: epsilon and delta to reach.
            population: declared, public number of units; only sets the divisor, never counted from data.
            sampling_rate: q; with `correlation` of those whose turn it is.
            rounds: T.
            clip_norm: C.
            adaptive_clip: how C follows the data.
            evaluation: scores on held-out data; training gets the noise that leaves room for them.
            groups: noise multiplier and groups of units with budgets of their own; then q is the mean sampling rate.
            correlation: how noise is correlated, and the number of rounds from one turn of a unit to the next.
            shares: makes the mechanism of a noise multiplier under DISTRIBUTED.
        """
        if population < 1:
            raise IncompatiblePlan(f"population is a positive public number of units, got {population}")
        rate, tiers = sampling_rate, tuple[Tier, ...]()
        over, turns = correlation or (None, 1)
        times = Participation(turns, rounds).times(rounds)
        releases = times if sampling_rate < 1.0 or over is None else 1  # without coins the run is one Gaussian
        if groups:
            z, tiers = groups
            rate = max(tier.sampling_rate for tier in tiers)
        else:
            z = calibrate_noise_multiplier(
                epsilon=budget.epsilon,
                delta=budget.delta,
                sampling_rate=sampling_rate,
                rounds=releases,
                beside=() if evaluation is None else ((evaluation.event, rounds // evaluation.every),),
                shared=shares is not None,
            )
        sampler: PoissonSampler | CyclicPoissonSampler = PoissonSampler(rate)
        mechanism: GaussianMechanism | CorrelatedGaussian | NoiseShares = GaussianMechanism(z) if shares is None else shares(z)
        if over is not None:
            sampler = CyclicPoissonSampler(turns, sampling_rate)
            mechanism = CorrelatedGaussian(over, z / math.sqrt(releases), clip_norm, rounds, sampler.participation(rounds))
        return cls(
            unit=unit,
            trust=trust,
            sites=sites,
            sampler=sampler,
            clip_norm=clip_norm,
            mechanism=mechanism,
            rounds=rounds,
            divisor=sampling_rate * population / turns,
            budget=budget,
            adaptive_clip=adaptive_clip,
            evaluation=evaluation,
            tiers=tiers,
        )

    @property
    def event(self) -> DpEvent:
        """What training costs in one round, or with correlated noise in all; known before any data is touched."""
        match self.sampler, self.mechanism:
            case CyclicPoissonSampler() as turns, CorrelatedGaussian() as correlated:
                return turns.amplify(correlated)
            case PoissonSampler() as coins, GaussianMechanism() | NoiseShares() as independent:
                return coins.amplify(independent.event)
        raise IncompatiblePlan(f"{self.mechanism} is accounted for with another sampler than {self.sampler}")

    def event_in(self, number: int) -> DpEvent:
        """What the ledger is charged for round `number`: a run with correlated noise is paid for with its first."""
        return NoOpDpEvent() if number > 1 and isinstance(self.mechanism, CorrelatedGaussian) else self.event

    @property
    def participation(self) -> Participation:
        """How often a unit takes part at most; public."""
        mechanism = self.mechanism
        return mechanism.participation if isinstance(mechanism, CorrelatedGaussian) else Participation(1, self.rounds)

    def event_of(self, tier: Tier) -> DpEvent:
        """What training costs a unit of `tier` in one round."""
        sampler = PoissonSampler(tier.sampling_rate)
        return sampler.amplify(GaussianMechanism(self.mechanism.noise_multiplier / tier.clip_share).event)

    def epsilon_of(self, tier: Tier, rounds: int) -> float:
        """Pessimistic epsilon of `rounds` rounds for a unit of `tier`, at that tier's delta; 0 for none."""
        composition = Composition()
        if rounds:
            composition.add(self.event_of(tier), rounds)
        return composition.epsilon(tier.budget.delta)

    def draw(self, units: Sequence[int], rng: SecureRandom, *, number: int, tier: int | None = None) -> NDArray[np.int64]:
        """Positions of units, each with a number that depends on no other, that take part in round `number`.

        They are in the order of tiers, or all of one `tier`.
        """
        population = len(units)
        if isinstance(self.sampler, CyclicPoissonSampler):
            return self.sampler.draw(units, rng, number=number)
        if not self.tiers:
            return self.sampler.draw(population, rng)
        if tier is not None:
            return PoissonSampler(self.tiers[tier].sampling_rate).draw(population, rng)
        if sum(each.units for each in self.tiers) != population:
            raise IncompatiblePlan(f"groups of {[each.units for each in self.tiers]} units are no population of {population}")
        starts = accumulate((each.units for each in self.tiers), initial=0)
        return np.concatenate(
            [
                start + self.draw(range(each.units), rng.derive(index), number=number, tier=index)
                for index, (start, each) in enumerate(zip(starts, self.tiers, strict=False))
            ]
        )

    @property
    def content_id(self) -> str:
        """SHA-256 of every field; sites and checkpoints compare it."""
        facts = asdict(self) | {"unit": self.unit.value, "trust": self.trust.value}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def epsilon_after(self, rounds: int) -> float:
        """Pessimistic epsilon of `rounds` rounds, of all if noise is correlated, and their evaluations at the budget's delta."""
        composition = Composition()
        composition.add(self.event, 1 if isinstance(self.mechanism, CorrelatedGaussian) else rounds)
        if self.evaluation is not None and rounds >= self.evaluation.every:
            composition.add(self.evaluation.event, rounds // self.evaluation.every)
        return composition.epsilon(self.budget.delta)

    def claimed(self, spend: Spend) -> float:
        """Epsilon that a run of this plan may state: of all planned rounds, however early it ended.

        What was released is a prefix of the planned releases whose length may follow from their values (a stopping rule, a person
        who has seen scores): post-processing of all of them (Dwork and Roth 2014, Proposition 2.1). The smaller epsilon of the
        prefix alone would hold for a length fixed in advance. A Renyi filter (arXiv 2008.11193, Theorem 4.3) states its whole
        budget too, with looser composition; no round's event is chosen from outputs, so none is needed. A charge that bought no
        published release is outside of the plan: then only the budget, which no ledger exceeds, is known in advance.
        """
        return max(spend.epsilon, self.epsilon_after(self.rounds) if spend.charges == spend.released else self.budget.epsilon)

    @property
    def extra_coordinates(self) -> int:
        """Coordinates of a contribution beside the trained ones: 1 for the bit of an adaptive clip."""
        return 0 if self.adaptive_clip is None else 1

    def sensitivity(self, clip_norm: float) -> float:
        """L2 bound of one unit's whole contribution in a round whose clip norm is `clip_norm`."""
        z = self.mechanism.noise_multiplier
        return clip_norm if self.adaptive_clip is None else self.adaptive_clip.sensitivity(clip_norm, z)

    def clip(self, rows: Tensor, clip_norm: float, units: Sequence[UnitId], *, tier: int = 0, weight: float = 1.0) -> BoundedSum:
        """Sum of the contributions of distinct units of one tier, rows `(B, d)`, each bounded by `sensitivity(clip_norm)`.

        A public `weight` in (0, 1] scales a row and its bound alike, so it adds up as weight times the clipped row.
        """
        if not 0.0 < weight <= 1.0:
            raise PrivacyError(f"a weight lies in (0, 1], or a unit would count for more than was charged; got {weight}")
        if self.adaptive_clip is None:
            share = self.tiers[tier].clip_share if self.tiers else 1.0
            return clip_examples(rows * weight, clip_norm, units, share=share * weight)
        return self.adaptive_clip.clip(rows, clip_norm, self.mechanism.noise_multiplier, units, weight=weight)

    def clip_norm_after(self, clip_norm: float, extra: Tensor) -> float:
        """The next round's clip norm, from the released mean of the extra coordinates."""
        if self.adaptive_clip is None:
            return clip_norm
        return self.adaptive_clip.following(clip_norm, float(extra), self.mechanism.noise_multiplier)

    def start_noise(self, size: int) -> Mapping[str, Tensor]:
        """What `release` of `size` coordinates keeps from round to round, before the first: a secret; often nothing."""
        return self.mechanism.start(size).tensors() if isinstance(self.mechanism, CorrelatedGaussian) else {}

    def release(
        self, total: BoundedSum, noise: Mapping[str, Tensor], *, permit: Permit, rng: SecureRandom
    ) -> tuple[Released, Mapping[str, Tensor]]:
        """The noised sum `(d,)` of the round that `permit` paid for, and the `noise` of the next; errors are the mechanism's."""
        mechanism, charged = self.mechanism, self.event_in(permit.round)
        if isinstance(mechanism, NoiseShares):
            raise IncompatiblePlan("noise comes in shares, which clients have added before a sum is seen: none is drawn here")
        if isinstance(mechanism, GaussianMechanism):
            return mechanism.release(total, charged=charged, permit=permit, rng=rng), {}
        released, state = mechanism.release(total, mechanism.restore(noise), charged=charged, permit=permit, rng=rng)
        return released, {} if state.round == self.rounds else state.tensors()  # nobody needs the secret any more

    def noise_norm(self, size: float, clip_norm: float, *, number: int = 1) -> float:
        """Expected L2 norm of the noise in the released mean of `size` coordinates at `clip_norm` in round `number`; public."""
        if isinstance(self.mechanism, CorrelatedGaussian):
            return self.mechanism.noise_std(number) * math.sqrt(size) / self.divisor
        std = self.mechanism.noise_multiplier * self.sensitivity(clip_norm) * self.noise_price
        return std * math.sqrt(size) / self.divisor

    @property
    def noise_price(self) -> float:
        """Noise in a sum, as a multiple of what the server alone would add for the same guarantee."""
        return self.mechanism.excess if isinstance(self.mechanism, NoiseShares) else math.sqrt(self.sites)
