r"""SCAFFOLD's control variates (Karimireddy et al. 2020, arXiv 1910.06378, option II) without a release of their own.

A client takes K steps of size eta along g - c_k + c: its own gradient, less its usual one c_k, plus everybody's usual one c. With
the change dy_k that it sends, clipped, both control variates follow one rule:

    client   c_k <- c_k -    (c +      dy_k  / (K eta))
    server   c   <- c   - q  (c + mean(dy_k) / (K eta)),    q = expected cohort / declared clients

The paper's clients send the change of c_k as well. It is a function of c, which is public, and of dy_k: so the server takes the
mean of the changes from the released mean of dy_k, which is post-processing, and nothing more is sent, noised or charged.
Where everybody takes part and there is no noise, c is the mean of all c_k exactly. Else it is that mean plus what the clients do
not know: noise, and how far the cohort's size is from its expectation. Neither is forgotten: it adds up over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from dp_federated_lora.aggregation.server_optimizer import OptimizerState, ServerOptimizer

CONTROL: Final = "control"
LENGTH: Final = "length"


def control_after(control: Tensor, common: Tensor, change: Tensor, length: float | Tensor, *, share: float = 1.0) -> Tensor:
    """The next control variate, all `(d,)` or shaped alike: `control - share (common + change / length)`.

    Args:
        control: c_k of a client, or c.
        common: c as the round began.
        change: what the client sends, or the mean of it.
        length: K eta of the round.
        share: of the clients that `change` stands for: 1 of itself, q of the server's.
    """
    return control - share * (common + change / length)


@final
@dataclass(frozen=True, slots=True)
class Scaffold:
    """A server optimiser that also follows c, from the same released means.

    Args:
        inner: turns the mean into the server's step.
        share: q, a public constant.
    """

    inner: ServerOptimizer
    share: float

    def init(self, size: int) -> OptimizerState:
        """The inner state, and c = 0 `(size,)`."""
        return {**self.inner.init(size), CONTROL: torch.zeros(size, dtype=torch.float64)}

    def update(self, mean: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, OptimizerState]:
        """The inner step; c moves by the round's `state["length"]`, K eta `(d,)`."""
        step, following = self.inner.update(mean, state)
        common = state[CONTROL]
        return step, {**following, CONTROL: control_after(common, common, mean, state[LENGTH], share=self.share)}
