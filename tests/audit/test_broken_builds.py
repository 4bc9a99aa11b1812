"""The audit of the audit: each broken build is caught by at least one audit, and the intact build passes all.

Seeds are fixed, so nothing here is flaky. For a random seed: the two bounds refute a correct build with probability at most
5 % by theorem, and of these builds under 1e-7 (`test_a_correct_build_is_refuted_far_less_often_than_allowed`); a replay on
neighbouring data has no false positives, as the same noise cancels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from broken_builds import BROKEN, INTACT, audits
from dp_federated_lora.audit import CanaryAudit, judge
from dp_federated_lora.privacy import SecureRandom

CAUGHT_BY = {
    "no noise": {"canaries"},
    "half noise": {"canaries"},
    "dropouts forgotten": {"canaries"},
    "clip off": {"canaries", "replay", "replay, hostile unit"},
    "divisor from private size": {"replay", "replay, hostile unit"},
    "noise after averaging": {"canaries"},
    "two factors, one charge": {"replay"},
    "expected participation": {"canaries"},
    "non-finite passes": {"replay, hostile unit"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_build_is_caught(name: str, tmp_path: Path):
    assert set(audits(BROKEN[name], tmp_path).caught_by) == CAUGHT_BY[name]


@pytest.mark.parametrize("name", INTACT)
def test_the_intact_build_passes_every_audit_and_its_bound_is_not_empty(name: str, tmp_path: Path):
    found = audits(INTACT[name], tmp_path)
    assert found.caught_by == ()
    assert 0.5 < found.verdict.lower_bound < found.verdict.claimed


@pytest.mark.parametrize("name", INTACT)
def test_a_correct_build_is_refuted_far_less_often_than_allowed(name: str):
    """In the model of undisturbed canaries, drawn without the engine: how many correct guesses would make the verdict FAIL?"""
    plan, m = INTACT[name].plan, 2000
    audit = CanaryAudit(m, SecureRandom.insecure_from(1))
    claimed = plan.epsilon_after(plan.rounds)

    def fails(correct: int) -> bool:
        audit.scores = lambda: np.where(audit.included, 1.0, -1.0) + np.arange(m) * 1e-6  # type: ignore[method-assign]
        audit.guesses = lambda _: type(perfect)(m, 400, correct)  # type: ignore[method-assign]
        return not judge(audit, plan, claimed=claimed, confidence=0.95).passed

    perfect = audit.guesses(np.where(audit.included, 1.0, -1.0))
    low, high = 200, 400
    assert fails(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    rng = np.random.default_rng(0)
    q, z, rounds = plan.sampler.sampling_rate, plan.mechanism.noise_multiplier, plan.rounds
    included = rng.random(2_000_000) < 0.5
    scores = included * rng.binomial(rounds, q, included.size) / (z * rounds**0.5) + rng.standard_normal(included.size)
    order = np.argsort(scores)
    tenth = included.size // 10
    right = (included[order[-tenth:]].mean() + (~included[order[:tenth]]).mean()) / 2
    assert binom.sf(high - 1, 400, right) < 1e-7
