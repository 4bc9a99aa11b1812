"""What a server does about participants who lie: groups, a robust rule over what was released, clips around the last aggregate.

The sums of g groups are released side by side as one vector. A unit is in one group, so the vector has the sensitivity of one
sum, and neither noise nor charge changes; but each of g sums has the noise of a whole round, so that their mean has sqrt(g) times
that of one sum over all. Everything after the release is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import LinearMethod
from dp_federated_lora.aggregation.robust import RobustAggregator, Updates
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy import PrivacyPlan, Released, SecureRandom


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """Against at most f participants who send what they like; by default nothing.

    Args:
        rule: a name in `aggregation.robust.RULES`; None adds up.
        f: how many participants may lie: a public assumption.
        before: names in `aggregation.robust.BEFORE`.
        parameters: of rule and stages, without streams.
        groups: g; more than one under trust = "central" with a rule, which then sees the noised mean of each group.
        around_aggregate: clients clip around the last aggregate, which is public; f of them then move the next one by at most
            f clip norms over the divisor. That they do clip is taken on trust.
    """

    rule: str | None = None
    f: int = 0
    before: tuple[str, ...] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)
    groups: int = 1
    around_aggregate: bool = False

    @property
    def active(self) -> bool:
        """Whether there is any; then the last aggregate is kept, as rules start from it, too."""
        return self.rule is not None or self.around_aggregate

    def require(self, method: LinearMethod, sources: int) -> None:
        """Check that every round can be aggregated.

        Args:
            method: says what is sent.
            sources: number of noised sums that a rule sees: groups, or participants that add noise themselves.

        Raises:
            AggregationError: if a name or parameter is wrong, or f more than a stage bears.
            IncompatiblePlan: if the method sends what cannot be compared or remembered, or a rule cannot run here.
        """
        if self.active and method.gather is not None:
            raise IncompatiblePlan(
                f"method {method.name!r} combines whole adapters in its own way, and no rule can take its place; use 'ffa', or "
                "no defence"
            )
        if self.active and method.settle is not None:
            raise IncompatiblePlan(
                f"method {method.name!r} gives B other coordinates after each round, so the last aggregate means nothing in the "
                "next; use 'ffa', or no defence"
            )
        if self.rule is None:
            return
        if self.rule in _NOT_IN_ROUNDS:
            raise IncompatiblePlan(f"{self.rule} cannot be the rule of a run: {_NOT_IN_ROUNDS[self.rule]}")
        Updates(method, torch.zeros(1), 0)
        self._aggregator(SecureRandom(bytes(SecureRandom.KEY_BYTES))).require(sources, self.f)  # draws nothing
        if sources <= 2 * self.f:
            raise IncompatiblePlan(
                f"{self.f} liars can spoil as many of {sources} groups, half of them or more: take more groups"
            )

    def deal(self, cohort: Sequence[int], roster: int, rng: SecureRandom) -> list[set[int]]:
        """The members of `cohort` in each of g groups, dealt by a secret permutation of the public roster of that size."""
        group = rng.uint64(roster).argsort() % self.groups
        return [{index for index in cohort if group[index] == number} for number in range(self.groups)]

    def aggregate(
        self, parts: Iterable[Released], *, plan: PrivacyPlan, method: LinearMethod, last: Tensor, rng: SecureRandom
    ) -> Tensor:
        """The aggregate `(d,)` of a round's noised sums, with a rule or without.

        Args:
            parts: noised sums `(d,)` of all units, of groups or of participants.
            plan: its divisor, shared out evenly, is that of each part: a public constant, whatever arrives.
            method: says what was sent.
            last: `(d,)` the last aggregate, zeros where none is kept.
            rng: the round's stream.
        """
        centre = last if self.around_aggregate else torch.zeros_like(last)
        if self.rule is None:
            return centre + total(parts, len(last)) / plan.divisor
        sources = max(self.groups, plan.sites)
        updates = Updates(method, last, sources)
        for part in parts:
            updates.add(replace(part, value=centre + part.value * (sources / plan.divisor)))
        return self._aggregator(rng.derive("robust"))(updates)

    @property
    def price(self) -> float:
        """Noise in the mean over groups, as a multiple of that in one sum over all."""
        return math.sqrt(self.groups)

    def _aggregator(self, rng: SecureRandom) -> RobustAggregator:
        streams = {"rng": rng} if "bucketing" in self.before else {}
        return RobustAggregator(rule=self.rule or "", f=self.f, before=self.before, parameters={**self.parameters, **streams})


UNDEFENDED: Final = Defence()

_NOT_IN_ROUNDS: Final = {
    "fltrust": "it needs an update that the server computes from public data, and there is none; use 'geometric_median'",
    "dnc": "its passes may drop every update, and the round would end in an error; use 'caf', which looks at all coordinates",
}


def total(parts: Iterable[Released], size: int) -> Tensor:
    """Sum `(size,)` of noised sums; one that is not finite counts as nothing."""
    finite = (part.value for part in parts if bool(part.value.isfinite().all()))
    return sum(finite, start=torch.zeros(size, dtype=torch.float64))
