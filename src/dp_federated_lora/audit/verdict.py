"""From guesses to a verdict: claimed epsilon, what was shown to be lost, and whether the two contradict each other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from dp_federated_lora.audit.bounds import (
    CosineEstimate,
    Guesses,
    boundary,
    cosine_estimate,
    curve_through,
    f_dp_refuted,
    one_run_bound,
)
from dp_federated_lora.audit.canaries import CanaryAudit
from dp_federated_lora.errors import AuditError
from dp_federated_lora.privacy import PrivacyPlan

_INTERVAL: Final = 1e-3
_EPSILONS: Final = np.expm1(np.linspace(0.0, np.log(100.0), 300))
_LEAST_NOISE: Final = 2.0  # the search for a bound stops at half the plan's noise: less makes composition slow


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an audit found.

    Args:
        claimed: epsilon that the ledger charged.
        delta: at which everything here holds.
        confidence: probability that a correct run passes, at least.
        guesses: what was guessed, and how well.
        one_run: bound; holds whatever the mechanism.
        f_dp: bound; of the plan's mechanism with less noise. It exceeds `claimed` exactly if the plan's whole trade-off function
            is refuted.
        estimate: estimate, no bound; None where scores show no distribution.
    """

    claimed: float
    delta: float
    confidence: float
    guesses: Guesses
    one_run: float
    f_dp: float
    estimate: CosineEstimate | None

    @property
    def lower_bound(self) -> float:
        """The larger bound. Each holds at 1 - (1 - confidence) / 2, so that both together hold at `confidence`."""
        return max(self.one_run, self.f_dp)

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim."""
        return not self.lower_bound > self.claimed

    def as_json(self) -> dict[str, Any]:
        """What `audit.json` holds; a number that is not finite is null."""
        estimate = self.estimate and asdict(self.estimate)
        return {
            "claimed_epsilon": self.claimed,
            "delta": self.delta,
            "confidence": self.confidence,
            "lower_bound": self.lower_bound,
            "passed": self.passed,
            **asdict(self.guesses),
            "bound_one_run": self.one_run,
            "bound_one_run_f_dp": self.f_dp,
            "estimate_cosine": estimate and {k: v if math.isfinite(v) else None for k, v in estimate.items()},
        }


def judge(audit: CanaryAudit, plan: PrivacyPlan, *, claimed: float, confidence: float) -> Verdict:
    """Hold what canaries show against a claim.

    Args:
        audit: canaries of a finished run.
        plan: of that run.
        claimed: epsilon stated for it.
        confidence: of the verdict.

    Raises:
        AuditError: if nothing was released or the confidence is not in (0, 1).
    """
    scores, delta, each = audit.scores(), plan.budget.delta, (1 + confidence) / 2
    guesses = audit.guesses(scores)
    try:
        estimate = cosine_estimate(scores[audit.included], delta=delta, confidence=confidence)
    except AuditError:
        estimate = None
    return Verdict(
        claimed=claimed,
        delta=delta,
        confidence=confidence,
        guesses=guesses,
        one_run=one_run_bound(guesses, delta=delta, confidence=each),
        f_dp=_plan_f_dp_bound(guesses, plan, confidence=each),
        estimate=estimate,
    )


def _plan_f_dp_bound(guesses: Guesses, plan: PrivacyPlan, *, confidence: float) -> float:
    """Epsilon of the plan with the least noise that is refuted: the one-run bound by f-DP, in the plan's own family.

    A Gaussian family would do for sampling rate 1 only: a sampled mechanism is not Gaussian at any noise. The curves come from
    dp-accounting and not from the kernel, which is under audit. Scores see training releases alone, but how many of them may
    follow from the evaluations (early stopping): so the curve is of both, of all that are planned.
    """
    z, evaluation = plan.mechanism.noise_multiplier, plan.evaluation

    def gaussian(noise: float, rate: float, count: int) -> Any:
        return from_gaussian_mechanism(
            noise,
            sampling_prob=rate,
            value_discretization_interval=_INTERVAL,
            pessimistic_estimate=True,  # a weaker claim is harder to refute, so this errs on the safe side
        ).self_compose(count)

    scored = evaluation and gaussian(evaluation.noise_multiplier, 1.0, plan.rounds // evaluation.every)

    def composed(noise: float) -> Any:
        training = gaussian(noise, plan.sampler.sampling_rate, plan.rounds)
        return training.compose(scored) if scored else training

    def refuted(inverse_noise: float) -> bool:
        if inverse_noise == 0.0:  # a run that reveals nothing
            return f_dp_refuted(guesses, lambda y: y, confidence=confidence)
        deltas = composed(1 / inverse_noise).get_delta_for_epsilon(_EPSILONS)
        return f_dp_refuted(guesses, curve_through(list(zip(_EPSILONS, deltas, strict=True))), confidence=confidence)

    low, high = (1 / z, _LEAST_NOISE / z) if refuted(1 / z) else (0.0, 1 / z)
    if not refuted(low):
        return 0.0
    least = high if refuted(high) else boundary(refuted, low, high, tolerance=1e-3)
    return float(composed(1 / least).get_epsilon_for_delta(plan.budget.delta)) if least > 0 else 0.0
