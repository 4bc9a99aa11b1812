"""How often a unit may take part where noise is correlated over rounds, and the record that holds a run to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, final

from dp_federated_lora.errors import IncompatiblePlan, ParticipationExceeded
from dp_federated_lora.privacy.bounded import UnitId


@final
@dataclass(frozen=True, slots=True)
class Participation:
    """The schema (k, b)-min-sep of arXiv 2306.08153 and, once a run is under way, who took part when: a secret.

    Args:
        separation: b >= 1; two rounds of one unit are at least this far apart, so 1 allows every round.
        maximum: k >= 1; rounds of one unit at most.
        taken: unit (or group) -> last round and number of rounds so far; JSON-able, grows with units, not with rounds.
    """

    separation: int
    maximum: int
    taken: Mapping[UnitId, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.separation < 1 or self.maximum < 1:
            raise IncompatiblePlan(f"separation and maximum are at least 1, got {self}")

    def times(self, rounds: int) -> int:
        """How often one unit can take part in `rounds` rounds."""
        return min(self.maximum, -(-rounds // self.separation))

    def allows(self, unit: UnitId, number: int) -> bool:
        """Whether `unit` may take part in round `number`."""
        last, times = self.taken.get(unit, (number - self.separation, 0))
        return number >= last + self.separation and times < self.maximum

    def admit(self, units: Iterable[UnitId], number: int) -> Self:
        """The record after `units` take part in round `number`.

        Raises:
            ParticipationExceeded: if one of them may not.
        """
        taken = dict(self.taken)
        for unit in units:
            last, times = self.taken.get(unit, (0, 0))
            if not self.allows(unit, number):
                raise ParticipationExceeded(
                    f"unit {unit!r} took part {times} times, last in round {last}, and cannot in round {number}: the noise "
                    f"covers at most {self.maximum} rounds of a unit, {self.separation} apart; leave it out of this round"
                )
            taken[unit] = (number, times + 1)
        return replace(self, taken=taken)

    def resume(self, taken: Mapping[str, Any]) -> Self:
        """The record with `taken` as JSON gave it back, under the same limit."""
        return replace(self, taken={UnitId(unit): (int(last), int(times)) for unit, (last, times) in taken.items()})
