"""Server optimisers: pure (init, update) pairs over flat vectors (Reddi et al. 2021, arXiv 2003.00295).

They see released values only, so they are post-processing; state is explicit and goes into the checkpoint. Coordinates do not
influence each other, and every tensor of a state has an entry for each: a round that sends only some passes only their part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

OptimizerState = Mapping[str, Tensor]


class ServerOptimizer(Protocol):
    """Turns the released mean change of a round into the step that the global adapter takes."""

    def init(self, size: int) -> OptimizerState:
        """State before the first round: tensors `(size,)`."""

    def update(self, mean: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        """The step `(d,)` to add to the adapter, and the next state, given the released mean `(d,)`."""


@final
@dataclass(frozen=True, slots=True)
class Sgd:
    """v <- momentum v + mean; step = learning_rate v. Momentum 0 and rate 1 is FedAvg."""

    learning_rate: float
    momentum: float = 0.0

    def init(self, size: int) -> OptimizerState:
        """Zero velocity `(size,)`."""
        return {"velocity": torch.zeros(size, dtype=torch.float64)}

    def update(self, mean: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        """Heavy-ball step."""
        velocity = self.momentum * state["velocity"] + mean
        return self.learning_rate * velocity, {"velocity": velocity}


@final
@dataclass(frozen=True, slots=True)
class Adam:
    """FedAdam with bias correction (Kingma and Ba 2015); epsilon is added outside the root.

    With `yogi` it is FedYogi: the second moment grows as in Adam and shrinks no faster than the squares (Zaheer et al. 2018).
    """

    learning_rate: float
    yogi: bool = False
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8

    def init(self, size: int) -> OptimizerState:
        """Zero moments and step counts."""
        return {name: torch.zeros(size, dtype=torch.float64) for name in ("first", "second", "steps")}

    def update(self, mean: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        """Adam or Yogi step."""
        steps, squares = state["steps"] + 1, mean**2
        first = self.beta1 * state["first"] + (1 - self.beta1) * mean
        excess = squares - state["second"]
        second = state["second"] + (1 - self.beta2) * (excess.sign() * squares if self.yogi else excess)
        unbiased = first / (1 - self.beta1**steps)
        scale = (second / (1 - self.beta2**steps)).sqrt() + self.epsilon
        return self.learning_rate * unbiased / scale, {"first": first, "second": second, "steps": steps}


@final
@dataclass(frozen=True, slots=True)
class Ftrl:
    r"""Follow the regularised leader, with a regulariser around the start x_0 that grows as sqrt(t) (dual averaging).

    With S_t the sum of the first t means,

        x_t = argmin_x  -<S_t, x> + sqrt(t) / (2 learning_rate) ||x - x_0||^2  =  x_0 + learning_rate S_t / sqrt(t)

    (Nesterov 2009; Xiao 2010). With `momentum`, M_t = momentum M_{t-1} + S_t stands for S_t, as in DP-FTRLM (Kairouz et al. 2021,
    arXiv 2103.00039). The adapter is a function of t and of sums of releases, and in those noise that is correlated over rounds
    is small; independent noise in S_t / sqrt(t) does not grow with t.

    A regulariser that stays the same, as in DP-FTRL's Algorithm 1, gives x_t = x_0 + learning_rate M_t, and the steps of that
    are those of `Sgd` with the same momentum: DP-FTRL itself is `Sgd` under correlated noise.
    """

    learning_rate: float
    momentum: float = 0.0

    def init(self, size: int) -> OptimizerState:
        """Zero sums and step counts."""
        return {name: torch.zeros(size, dtype=torch.float64) for name in ("total", "leader", "steps")}

    def update(self, mean: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        """From x_{t-1} to x_t."""
        total, steps = state["total"] + mean, state["steps"] + 1
        leader = self.momentum * state["leader"] + total
        before = state["leader"] / state["steps"].clamp(min=1).sqrt()
        step = self.learning_rate * (leader / steps.sqrt() - before)
        return step, {"total": total, "leader": leader, "steps": steps}
