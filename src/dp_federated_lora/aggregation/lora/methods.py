r"""Methods whose contribution is a sum: they say which factors are trained and sent.

With W = W0 + s B A, averaging both factors is not averaging their product: the error is the covariance of B_k and
A_k over clients, and noise on both factors is amplified by their product. Freezing A removes both
(Sun et al. 2024, FFA-LoRA, arXiv 2403.12313).

A head that starts at zero gives the adapter below it no gradient, only noise, until it has learnt something. Training the
head alone first avoids that (Kumar et al. 2022, arXiv 2202.10054; under DP: Ke et al. 2024, arXiv 2402.18905).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from dp_federated_lora.lora import Factor


@final
@dataclass(frozen=True, slots=True)
class LinearMethod:
    """A method in which each client sends the change of the trained factors and the server adds their mean.

    Args:
        name: as in `[method] name`.
        factors: what is trained and sent, beside nothing else.
        head_rounds: number of rounds at the start in which the head alone is.
    """

    name: str
    factors: frozenset[Factor]
    head_rounds: int = 0

    def factors_in(self, number: int) -> frozenset[Factor]:
        """What is trained and sent in round `number` (1-based)."""
        return HEAD_ALONE if number <= self.head_rounds else self.factors


HEAD_ALONE: Final = frozenset((Factor.HEAD,))
FFA: Final = LinearMethod("ffa", frozenset((Factor.B, Factor.HEAD)))
FEDAVG: Final = LinearMethod("fedavg", frozenset((Factor.A, Factor.B, Factor.HEAD)))
