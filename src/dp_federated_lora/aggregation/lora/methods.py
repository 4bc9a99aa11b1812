r"""Methods: they say which factors are trained and sent, and what the server does with their mean.

With W = W0 + s B A, averaging both factors is not averaging their product: the error is the covariance of B_k and A_k over
clients, and noise on both factors is amplified by their product. All but FedAvg therefore train, or send, one of them at a time.

| name | trained | source |
|---|---|---|
| fedavg | A and B together | FedIT (arXiv 2305.05644) |
| ffa | B over a frozen A | FFA-LoRA (Sun et al. 2024, arXiv 2403.12313) |
| rolora | B and A in turn, round by round | RoLoRA (Chen et al. 2024, arXiv 2409.02346) |
| lalora | B and A in turn, local step by local step; both are sent | LA-LoRA (arXiv 2602.19926), without its low-pass filter |
| fedask | B over a shared A; then the server splits B A anew | FedASK (arXiv 2507.09990), see `fedask.py` |
| fedpower | A and B together; sent is the product, on one side and then the other | FedPower (arXiv 2605.08443), `fedpower.py` |
| fedsb | an r x r core between a fixed B and A | Fed-SB (arXiv 2502.15436), fixed factors by SVD of W0 |
| fedsa | A and B together; A is sent, each client keeps a B of its own | FedSA-LoRA (arXiv 2410.01463) |

flora, fedex, flexlora and hetlora train A and B together and combine whole adapters instead of adding changes: see `gathered.py`.

A head that starts at zero gives the adapter below it no gradient, only noise, until it has learnt something. Training the
head alone first avoids that (Kumar et al. 2022, arXiv 2202.10054; under DP: Ke et al. 2024, arXiv 2402.18905).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

from dp_federated_lora.aggregation.compression import NO_SKETCH, Sketch
from dp_federated_lora.aggregation.lora.fedask import split_anew
from dp_federated_lora.aggregation.lora.fedpower import orthonormalised, projected
from dp_federated_lora.aggregation.lora.gathered import Gather, fedex, flexlora, flora, hetlora
from dp_federated_lora.lora import Factor

Factors = frozenset[Factor]


@final
@dataclass(frozen=True, slots=True)
class LinearMethod:
    """A method in which each client sends the change of what it trained and the server adds their mean, unless it has a `gather`.

    Args:
        name: as in `[method] name`.
        factors: all that is ever trained and sent.
        turns: what is sent in one round after the other, over and over; all of `factors` if empty.
        local_turns: what one local step after the other trains; all that the round trains if empty.
        project: what is sent, from the adapter, the change of all `factors`, the kinds to send and the clip norm; None where a
            round trains what it sends, and sends the change.
        settle: what the server does to the adapter after a round that sent these kinds and not the head alone; it sees released
            values only.
        settles: what the server changes beside `factors`, by `settle` or `gather`.
        head_rounds: number of rounds at the start in which the head alone is trained.
        gather: what makes the next adapter of all participants' noised ones, in place of the mean of changes.
        kept: what each client trains beside `factors` and keeps to itself.
        sketch: how what is sent is compressed.
    """

    name: str
    factors: Factors
    turns: tuple[Factors, ...] = ()
    local_turns: tuple[Factors, ...] = ()
    project: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Factors, float], Mapping[str, Tensor]] | None = None
    settle: Callable[[Mapping[str, Tensor], Factors], Mapping[str, Tensor]] | None = None
    settles: Factors = frozenset()
    head_rounds: int = 0
    gather: Gather | None = None
    kept: Factors = frozenset()
    sketch: Sketch = NO_SKETCH

    def factors_in(self, number: int) -> Factors:
        """What is sent in round `number` (1-based)."""
        if number <= self.head_rounds:
            return HEAD_ALONE
        return self.turns[(number - self.head_rounds - 1) % len(self.turns)] if self.turns else self.factors

    @property
    def fixed_gauge(self) -> bool:
        """Whether no round sends both factors: then nobody can send the same adapter in other numbers, (c B, A / c)."""
        return not any(sent >= {Factor.A, Factor.B} for sent in self.turns or (self.factors,))

    def kept_in(self, number: int) -> Factors:
        """What is trained in round `number` and kept by each client."""
        return frozenset() if self.factors_in(number) == HEAD_ALONE else self.kept

    def trained_in(self, number: int) -> Factors:
        """What clients train in round `number`, whether they send it or not."""
        sent = self.factors_in(number)
        return (sent if self.project is None or sent == HEAD_ALONE else self.factors) | self.kept_in(number)

    def local_factors(self, number: int) -> tuple[Factors, ...]:
        """What the local steps of round `number` train, in turn."""
        trained = self.trained_in(number)
        return tuple(turn & trained for turn in self.local_turns) if self.local_turns else (trained,)


HEAD_ALONE: Final = frozenset((Factor.HEAD,))
_A: Final = frozenset((Factor.A, Factor.HEAD))
_B: Final = frozenset((Factor.B, Factor.HEAD))

FEDAVG: Final = LinearMethod("fedavg", _A | _B)
FFA: Final = LinearMethod("ffa", _B)
ROLORA: Final = LinearMethod("rolora", _A | _B, turns=(_B, _A))  # B first: while it is zero, A has no gradient
LALORA: Final = LinearMethod("lalora", _A | _B, local_turns=(_B, _A))
FEDASK: Final = LinearMethod("fedask", _B, settle=split_anew, settles=_A)
FEDPOWER: Final = LinearMethod("fedpower", _A | _B, turns=(_B, _A), project=projected, settle=orthonormalised)
FEDSB: Final = LinearMethod("fedsb", frozenset((Factor.CORE, Factor.HEAD)))
FEDSA: Final = LinearMethod("fedsa", _A, kept=frozenset((Factor.B,)))


_INCREMENT: Final = frozenset((Factor.INCREMENT,))
FLORA: Final = LinearMethod("flora", _A | _B, settles=_INCREMENT, gather=flora)
FEDEX: Final = LinearMethod("fedex", _A | _B, settles=_INCREMENT, gather=fedex)
FLEXLORA: Final = LinearMethod("flexlora", _A | _B, gather=flexlora)
HETLORA: Final = LinearMethod("hetlora", _A | _B, gather=hetlora)

_SUMS: Final = (FEDAVG, FFA, ROLORA, LALORA, FEDASK, FEDPOWER, FEDSB, FEDSA)
METHODS: Final = {method.name: method for method in (*_SUMS, FLORA, FEDEX, FLEXLORA, HETLORA)}
