r"""Gaussian noise that is correlated over rounds: less noise in the sum of all updates, without secret sampling.

Round t adds n_t = Z_t - m_t with m_t = c_1 n_{t-1} + c_2 n_{t-2} + ..., that is n = C^{-1} Z for the Toeplitz matrix C with first
column c_0 = 1, c_1, ... (matrix factorisation, arXiv 2306.08153). Any C is safe: Z is scaled to its sensitivity.

**Guarantee.** Let g_t be the integer sum of round t and N_t a true normal deviate. The release is x_t = g_t + n_t with
n_t = round(N_t - m_t - e_t), drawn exactly; e_t is what arithmetic makes of m_t. Put U = C g + N - e. As g_t is an integer and
n = x - g,

    x_t = round(g_t + N_t - m_t - e_t) = round(U_t - c_1 x_{t-1} - c_2 x_{t-2} - ...),

a function of U_t and earlier releases. So the releases are post-processing of U, one Gaussian mechanism on a stream that may
depend on earlier releases (Denisov et al. 2022, arXiv 2202.08312, Theorem 2.1). Its sensitivity is that of C under the
participation limit, which every release enforces, and what e adds. Given the releases, e is a function of g, so it moves U
between neighbours by at most 2 max |e_t| sqrt(T d). That is kept below 2^10 lattice units, 2^-12 of the least sensitivity there
is, and the noise is that much larger.

**How large e is.** m_t is a weighted sum of the k rows of a memory: of the last noises themselves (bands), or of decaying sums of
all noises (buffers), which float64 rounds twice in each round. If no row exceeds B, a row is off by 2^-51 T B at most, and m_t by
2^-51 (T + k) B times the sum of the weights. B is that of deviates up to 20 sigma: it holds in all but 1e-70 of runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from dp_accounting import GaussianDpEvent, NoOpDpEvent, SelfComposedDpEvent
from numpy.typing import NDArray
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, PermitMismatch, PrivacyError
from dp_federated_lora.privacy.accounting import DpEvent, gaussian_parts
from dp_federated_lora.privacy.bounded import BoundedSum, Released
from dp_federated_lora.privacy.clipping import resolution
from dp_federated_lora.privacy.participation import Participation
from dp_federated_lora.privacy.permits import Permit
from dp_federated_lora.privacy.rng import SecureRandom

Floats = NDArray[np.float64]

_REACH: Final = 20.0  # P(|N| > 20 sigma) < 1e-88
_LARGEST: Final = 2.0**44  # of a row in lattice units: noise is drawn exactly up to sigma = 2^40, and float64 holds such integers
_SLACK: Final = 2.0**10  # lattice units by which e may move U
_MARGIN: Final = 1.0 + 2.0**-12 + 2.0**-30  # on the noise, for e and for float64 in the sensitivity


def inverse(column: Floats) -> Floats:
    """First column of C^{-1} `(n,)` from that of the lower-triangular Toeplitz matrix C, whose first entry is 1."""
    result = np.zeros_like(column)
    result[0] = 1.0
    for t in range(1, len(result)):
        result[t] = -column[1 : t + 1] @ result[t - 1 :: -1]
    return result


def sensitivity(column: Floats, participation: Participation) -> float:
    """L2 sensitivity of C with first column `(n,)` to a unit of norm 1 in each of its rounds; exact up to float64.

    The worst unit takes part in rounds 1, 1 + b, 1 + 2 b and so on: with at most b bands, because the columns of its rounds are
    orthogonal and the first are the longest; with a column non-negative and never increasing, by arXiv 2405.13763, Theorem 2.

    Raises:
        IncompatiblePlan: if neither holds.
    """
    separation, bands = participation.separation, int(np.flatnonzero(column)[-1]) + 1
    if bands > separation and not ((column >= 0.0).all() and (np.diff(column) <= 0.0).all()):
        raise IncompatiblePlan(
            f"{bands} bands for rounds of a unit {separation} apart: then bands must be non-negative and never increase"
        )
    total = np.zeros_like(column)
    for start in range(0, participation.times(len(column)) * separation, separation):
        total[start:] += column[: len(column) - start]
    return float(np.linalg.norm(total))


@final
@dataclass(frozen=True, slots=True)
class Correlation:
    """C of a few bands, c_j = weight_j, or without end (BLT, arXiv 2408.08868), c_j = sum_i weight_i decay_i^(j-1); c_0 = 1.

    Args:
        weights: finite; one for each row of the memory.
        decays: in [0, 1), as many as weights; empty for bands.

    Raises:
        IncompatiblePlan: if they are not.
    """

    weights: tuple[float, ...]
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not np.isfinite(self.weights).all() or (self.decays and len(self.decays) != len(self.weights)):
            raise IncompatiblePlan(f"weights are finite and there is a decay for each or none, got {self}")
        if not all(0.0 <= decay < 1.0 for decay in self.decays):
            raise IncompatiblePlan(f"decays lie in [0, 1), got {self.decays}")

    def column(self, rounds: int) -> Floats:
        """First column of C, `(rounds,)`."""
        bands = np.array(self.weights)
        if self.decays:
            bands = (bands[:, None] * np.power.outer(np.array(self.decays), np.arange(rounds - 1))).sum(axis=0)
        return np.pad(np.append(1.0, bands), (0, rounds))[:rounds]

    def predict(self, memory: Tensor) -> Floats:
        """m_t + e_t `(d,)`, added in one order: a resumed run must round as the interrupted one did."""
        return sum((weight * row for weight, row in zip(self.weights, memory.numpy(), strict=True)), np.zeros(memory.shape[1]))

    def remember(self, memory: Tensor, noise: Tensor) -> Tensor:
        """The memory `(rows, d)` after a round with `noise` `(d,)`."""
        if self.decays:
            return torch.tensor(self.decays, dtype=torch.float64)[:, None] * memory + noise
        return torch.cat([noise[None], memory])[: len(memory)]


@final
@dataclass(frozen=True, slots=True, repr=False)
class NoiseState:
    """Rounds released, what is kept of their noise `(rows, d)` in lattice units, and who took part.

    Secret: whoever reads it can subtract noise.
    """

    round: int
    memory: Tensor
    participation: Participation

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint, just as secret; `CorrelatedGaussian.restore` reads it back."""
        facts = json.dumps({"round": self.round, "taken": self.participation.taken})
        return {"memory": self.memory, "facts": torch.tensor(list(facts.encode()), dtype=torch.uint8)}


@final
@dataclass(frozen=True, slots=True)
class CorrelatedGaussian:
    """Correlated Gaussian noise on the sums of a run, paid for as a whole with its first round.

    Args:
        correlation: over rounds.
        noise_multiplier: z > 0, standard deviation of Z over the sensitivity of the whole run.
        clip_norm: of every round; the noise memory is in its units.
        rounds: T.
        participation: how often a unit may take part; nobody has yet.

    Raises:
        IncompatiblePlan: if a field is out of range, the sensitivity is not known, or float64 is too coarse for so much noise.
    """

    correlation: Correlation
    noise_multiplier: float
    clip_norm: float
    rounds: int
    participation: Participation

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0 and self.rounds >= 1):
            raise IncompatiblePlan(f"noise_multiplier must be positive and finite, rounds at least 1, got {self}")
        if len(self.correlation.weights) >= self.rounds:
            raise IncompatiblePlan(f"{self.rounds} rounds need fewer rows of memory than {len(self.correlation.weights)}")
        self._require_precision(1)

    @property
    def event(self) -> GaussianDpEvent:
        """The event of the whole run, for whoever takes part within the limit."""
        return GaussianDpEvent(self.noise_multiplier)

    @property
    def turn_event(self) -> GaussianDpEvent:
        """The event of one participation out of `participation.times(rounds)`.

        Raises:
            IncompatiblePlan: if the rounds of one unit overlap in C, so that they cannot be charged one by one.
        """
        if (bands := int(np.flatnonzero(self._column)[-1]) + 1) > self.participation.separation:
            raise IncompatiblePlan(f"{bands} bands, but rounds of one unit only {self.participation.separation} apart")
        return GaussianDpEvent(self.noise_multiplier * math.sqrt(self.participation.times(self.rounds)))

    def noise_std(self, number: int) -> float:
        """Standard deviation of each coordinate's noise in round `number`; public."""
        return self._deviate * float(np.linalg.norm(inverse(self._column[:number])))

    def start(self, size: int) -> NoiseState:
        """The state before the first round of sums `(size,)`; IncompatiblePlan if float64 is too coarse for so many."""
        self._require_precision(size)
        return NoiseState(0, torch.zeros(len(self.correlation.weights), size, dtype=torch.float64), self.participation)

    def restore(self, tensors: Mapping[str, Tensor]) -> NoiseState:
        """The state that `NoiseState.tensors` wrote; the checkpoint around it proves that it is of this run.

        Raises:
            PrivacyError: if it does not fit this mechanism.
        """
        facts, memory = json.loads(bytes(tensors["facts"].tolist())), tensors["memory"]
        if len(memory) != len(self.correlation.weights) or not 0 <= facts["round"] <= self.rounds:
            raise PrivacyError(f"a noise memory of {len(memory)} rows after round {facts['round']} is not of {self}")
        return NoiseState(facts["round"], memory, self.participation.resume(facts["taken"]))

    def release(
        self, total: BoundedSum, state: NoiseState, *, charged: DpEvent, permit: Permit, rng: SecureRandom
    ) -> tuple[Released, NoiseState]:
        """Burn the permit, then draw noise; returns the noised sum `(d,)` float64 and the next state.

        Args:
            total: the sealed sum of the round after `state`.
            state: of `start` or the release before.
            charged: the whole run, or, after the first round, `NoOpDpEvent`: it has been paid for.
            permit: proof that exactly this event is in the ledger for this round and the stream `rng`.
            rng: the round's stream.

        Raises:
            ParticipationExceeded: if a unit in the sum takes part too soon or too often.
            PermitSpent: if the permit bought a release already.
            PermitMismatch: if it is for another round, event, stream or mechanism.
            PrivacyError: if the run is over, or the sum has another size or clip norm.
        """
        number = state.round + 1
        if number > self.rounds or total.clip_norm != self.clip_norm or total._value.shape != state.memory.shape[1:]:
            raise PrivacyError(f"round {number}, size {total._value.numel()}, clip norm {total.clip_norm} are not of {self}")
        if permit.round != number or not self._paid_by(charged, number):
            raise PermitMismatch(f"{charged} in round {permit.round} does not pay for round {number} of {self}")
        participation = state.participation.admit(total._units, number)
        permit.burn(charged, rng.commitment)
        unit = resolution(self.clip_norm)
        centre = -self.correlation.predict(state.memory)
        whole = np.rint(centre)
        drawn = rng.derive("noise").rounded_gaussian(self._deviate / unit, len(centre), offset=centre - whole)
        noise = torch.from_numpy(drawn + whole.astype(np.int64))
        released = Released((total._value + noise).to(torch.float64) * unit, self.noise_std(number), rng.insecure)
        return released, NoiseState(number, self.correlation.remember(state.memory, noise.to(torch.float64)), participation)

    @property
    def _column(self) -> Floats:
        return self.correlation.column(self.rounds)

    @property
    def _deviate(self) -> float:
        """Standard deviation of Z."""
        return self.noise_multiplier * _MARGIN * sensitivity(self._column, self.participation) * self.clip_norm

    def _require_precision(self, size: int) -> None:
        response, correlation, deviate = inverse(self._column), self.correlation, self._deviate / resolution(self.clip_norm)
        powers = [decay ** np.arange(self.rounds) for decay in correlation.decays] or [np.ones(1)]
        rows = [np.convolve(each, response)[: self.rounds] for each in powers]
        largest = max(_REACH * deviate * float(np.linalg.norm(row)) + _SLACK * float(np.abs(row).sum()) for row in rows)
        error = 2.0**-51 * (self.rounds + len(correlation.weights)) * largest * float(np.abs(correlation.weights).sum())
        if largest > _LARGEST or 2.0 * error * math.sqrt(self.rounds * size) > _SLACK:
            raise IncompatiblePlan(
                f"float64 cannot carry noise of deviation {self._deviate:.3g} over {self.rounds} rounds and {size} "
                "numbers: take fewer rounds or participations, or a smaller noise_multiplier"
            )

    def _paid_by(self, charged: DpEvent, number: int) -> bool:
        if isinstance(charged, NoOpDpEvent):
            return number > 1
        if isinstance(charged, SelfComposedDpEvent):  # sampled by turns
            turns, (_, multiplier) = self.participation.times(self.rounds), gaussian_parts(charged.event)
            return bool(charged.count == turns and multiplier == self.turn_event.noise_multiplier)
        return bool(charged == self.event)
