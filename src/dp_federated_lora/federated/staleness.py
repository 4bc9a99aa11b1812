r"""Buffered asynchronous rounds (FedBuff, Nguyen et al. 2022, arXiv 2106.06639) that cost what synchronous ones do.

A participant with delay tau works while the server takes tau more steps: what enters release t it computed on the adapter after
round max(0, t - 1 - tau), and it weighs 1 / sqrt(1 + staleness), FedBuff's polynomial.

**Why the charge is that of a synchronous round.** Delays are public and depend on no data. Who is in release t is decided by
fresh, independent coins for that release, as always, and what a unit then adds is a function of its own data and of earlier
releases, clipped to weight times C <= C. So, given the releases before it, release t is the same Poisson-sampled Gaussian of
sensitivity C, and adaptive composition does not mind how old the releases are that a contribution began with.

FedBuff itself fills its buffer with whoever is ready first. Then speed decides who takes part; speed depends on the amount of
data and is seen by others, so there are no secret coins and nothing is amplified. Such a server has to be planned with
sampling_rate = 1 and to close its buffer by the clock: closed at a number of contributions, one unit more keeps another out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

Earlier = Mapping[str, Tensor]
"""What the rounds before changed: for each trained tensor its values `(k, *shape)` after earlier rounds, the latest first."""


def staleness_weight(staleness: int) -> float:
    """Weight in (0, 1] of a contribution that began `staleness` server steps ago (arXiv 2106.06639, section 5)."""
    return 1.0 / math.sqrt(1.0 + staleness)


@final
@dataclass(frozen=True, slots=True)
class Delays:
    """How many server steps each participant takes to answer: public, from its name and the seed alone.

    As it does not depend on the list of participants, one of them more or less changes nobody else's delay.

    Args:
        longest: delays are uniform in 0 .. longest; 0 makes all rounds synchronous.
        seed: public.
    """

    longest: int = 0
    seed: int = 0

    def of(self, name: str) -> int:
        """The delay of a participant, in server steps."""
        digest = hashlib.sha256(repr(("delay", self.seed, name)).encode()).digest()
        return int.from_bytes(digest[:8]) % (self.longest + 1)

    def groups(self, names: Sequence[str], finished: int) -> list[list[int]]:
        """Positions in `names` by staleness after `finished` rounds, entry s for s steps; some may be empty."""
        groups: list[list[int]] = [[] for _ in range(min(self.longest, finished) + 1)]
        for position, name in enumerate(names):
            groups[min(self.of(name), finished)].append(position)
        return groups

    def mean_weight(self, names: Sequence[str]) -> float:
        """Mean weight of the participants' contributions once every delay can be waited for; public."""
        return sum(staleness_weight(self.of(name)) for name in names) / len(names)

    def remember(self, adapter: Mapping[str, Tensor], earlier: Earlier, trained: Iterable[str]) -> Earlier:
        """What later rounds need of `adapter` and of those before it: at most `longest` values of each `trained` tensor."""
        if self.longest == 0:
            return {}
        return {n: torch.cat([adapter[n][None], *([earlier[n]] if earlier else [])])[: self.longest] for n in trained}


SYNCHRONOUS: Final = Delays()
