"""What a run would do and promise, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.statement import statement_at, statement_json
from dp_federated_lora.lab.workbench import Workbench, participant_names
from dp_federated_lora.monitoring.statement import StatementRow
from dp_federated_lora.privacy import PrivacyPlan, Spend


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Public facts of a run; `as_json` has the keys that `dpfl plan --json` prints.

    Args:
        privacy: the calibrated plan.
        trainable_parameters: scalars trained and sent.
        trainable_fraction: their share of the base model.
        bytes_per_client_round: adapter bytes to a client and back; fewer in rounds that train the head alone.
        noise_norm: expected L2 norm of the noise in a round's mean update.
        groups: whose sums are released one by one, for a robust rule; 1 without.
        mean_weight: of contributions, by how old the adapter is that they began with; 1 without delays.
        statement: what the run would end with.
    """

    privacy: PrivacyPlan
    trainable_parameters: int
    trainable_fraction: float
    bytes_per_client_round: int
    noise_norm: float
    groups: int
    mean_weight: float
    statement: tuple[StatementRow, ...]

    def as_json(self) -> dict[str, Any]:
        """One flat object of numbers, and the statement."""
        return {
            "noise_multiplier": self.privacy.mechanism.noise_multiplier,
            "sampling_rate": self.privacy.sampler.sampling_rate,
            **participation_json(self.privacy),
            "steps": self.privacy.rounds,
            "expected_cohort": self.privacy.divisor,
            "delta": self.privacy.budget.delta,
            "noise_norm": self.noise_norm,
            "clip_norm": self.privacy.clip_norm,
            "trust": self.privacy.trust.value,
            "noise_sources": self.privacy.sites,
            "noise_price": self.privacy.noise_price,
            "groups": self.groups,
            "mean_weight": self.mean_weight,
            "trainable_parameters": self.trainable_parameters,
            "trainable_fraction": self.trainable_fraction,
            "bytes_per_client_round": self.bytes_per_client_round,
            "statement": statement_json(self.statement),
        }


def participation_json(plan: PrivacyPlan) -> dict[str, Any]:
    """How often a unit takes part at most, and how many rounds lie between."""
    limit = plan.participation
    return {"participations": limit.times(plan.rounds), "separation": limit.separation}


def participation_in_words(plan: PrivacyPlan) -> str:
    """The same for people."""
    facts = participation_json(plan)
    return f"at most {facts['participations']:,}" + (f", {facts['separation']:,} apart" if facts["separation"] > 1 else "")


def plan_run(config: Config) -> RunPlan:
    """Plan a run: calibrate noise and count what is trained. Loads the model, touches no training data."""
    bench = Workbench.of(config)
    plan = privacy_plan(config)
    server, _ = bench.server(plan)
    whole = Spend(plan.epsilon_after(plan.rounds), plan.budget.delta, plan.rounds, plan.rounds)
    statement = statement_at(config, plan, whole)
    return RunPlan(
        privacy=plan,
        trainable_parameters=server.layout.size,
        trainable_fraction=bench.trainable_fraction,
        bytes_per_client_round=server.bytes_per_client(plan.rounds),
        noise_norm=server.noise_norm(plan.rounds, plan.clip_norm),
        groups=server.defence.groups,
        mean_weight=server.delays.mean_weight(participant_names(config)),
        statement=statement,
    )
