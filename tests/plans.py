"""A privacy plan small enough to check by hand, for tests of whatever follows one."""

from __future__ import annotations

from dp_federated_lora.privacy import Budget, GaussianMechanism, PoissonSampler, PrivacyPlan, PrivacyUnit, Trust


def a_plan(**changes: object) -> PrivacyPlan:
    """Three rounds over an expected cohort of 50 clients, with fields changed."""
    facts: dict[str, object] = {
        "unit": PrivacyUnit.CLIENT,
        "trust": Trust.CENTRAL,
        "sampler": PoissonSampler(0.5),
        "clip_norm": 2.0,
        "mechanism": GaussianMechanism(1.5),
        "rounds": 3,
        "divisor": 50.0,
        "budget": Budget(100.0, 1e-5),
    }
    return PrivacyPlan(**(facts | changes))  # type: ignore[arg-type]
