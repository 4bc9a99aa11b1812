"""What a plan promises against whom, whether a run of it is ahead, under way, ended early or finished."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Final

from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.shuffling import shuffled_gaussian_epsilon
from dp_federated_lora.lab.workbench import defence_notes, unit_notes
from dp_federated_lora.monitoring.statement import StatementRow
from dp_federated_lora.privacy import CorrelatedGaussian, NoiseShares, PrivacyPlan, Spend, Trust

RELATION: Final = "add or remove one"


def statement_json(statement: tuple[StatementRow, ...]) -> list[dict[str, Any]]:
    """The statement as plain objects; epsilon null means no guarantee."""
    return [asdict(row) | {"assumptions": list(row.assumptions)} for row in statement]


def statement_at(config: Config, plan: PrivacyPlan, spend: Spend) -> tuple[StatementRow, ...]:
    """The statement of a run of this configuration and plan that has spent `spend`."""
    notes = unit_notes(config) + defence_notes(config)
    rows = state_privacy(plan, spend=spend, insecure=config.run.insecure_seed is not None, notes=notes)
    return (*rows, _behind_the_shuffler(rows[0], plan, spend)) if config.privacy.shuffler else rows


def _behind_the_shuffler(row: StatementRow, plan: PrivacyPlan, spend: Spend) -> StatementRow:
    """What `row` becomes where the server gets the reports from a shuffler; charges do not count on it, as it sees names."""
    mixed_by = (
        f"a shuffler that helps nobody passes on all {plan.sites} reports of a round, without names and mixed, and no "
        "participant tells which one is its own"
    )
    epsilon = row.epsilon
    if epsilon is not None:
        mixed = shuffled_gaussian_epsilon(
            reports=plan.sites,
            noise_multiplier=plan.mechanism.noise_multiplier,
            sampling_rate=plan.sampler.sampling_rate,
            rounds=max(spend.charges, plan.rounds),
            delta=spend.delta,
        )
        epsilon = min(epsilon, mixed)
    return replace(row, adversary="the server behind the shuffler", epsilon=epsilon, assumptions=(*row.assumptions, mixed_by))


def state_privacy(plan: PrivacyPlan, *, spend: Spend, insecure: bool, notes: tuple[str, ...] = ()) -> tuple[StatementRow, ...]:
    """The statement of a plan.

    Args:
        plan: what was or will be executed.
        spend: what the run's ledger has charged.
        insecure: noise or cohorts came from a seed; then no row claims anything.
        notes: what the unit means for this data; said in every row that claims something.
    """
    coins = "each unit takes part by independent secret coins (Poisson); nobody else learns who took part in a round"
    chosen: tuple[str, ...] = (coins,)
    if isinstance(plan.mechanism, CorrelatedGaussian):
        turns = f"no unit takes part more than {plan.participation.times(plan.rounds)} times or twice in fewer than "
        turns += f"{plan.participation.separation} rounds: a public schedule says whose turn it is, and each release checks it"
        chosen = (turns, coins) if plan.sampler.sampling_rate < 1.0 else (turns,)
    server = "the server computes sums and noise as this software does, and keeps un-noised values to itself"
    others = "they see every global adapter of the run; all of them are charged"
    adversaries = {"recipients of the model": (server, *chosen), "other participants": (server, *chosen, others)}
    if plan.trust is Trust.LOCAL:
        own = "the unit's own participant, on its own machine, tosses secret coins (Poisson), clips and adds noise as it should"
        always = "every participant reports in every round, noise alone if need be; that it belongs to the run is public"
        alone = "nobody else is trusted, even if the server and all other participants put together what they see"
        adversaries = dict.fromkeys(adversaries, (own, always)) | {"the server": (own, always, alone)}
    if isinstance(plan.mechanism, NoiseShares):
        own = "the unit's own participant, on its own machine, tosses secret coins (Poisson), clips and adds its share of noise"
        always = "every participant takes part in every sum, with noise alone if need be; that it belongs to the run is public"
        server = f"the server may be malicious: {plan.mechanism.statement}"
        adversaries = dict.fromkeys((*adversaries, "the server"), (own, always, server))
    seed = ("NOT PRIVATE: noise and sampling came from a fixed seed that anyone can repeat",)
    whole = f"epsilon is of all {plan.rounds} planned rounds: a run that ends early, by a rule or by hand, states no less"
    if spend.charges != spend.released and not plan.tiers:
        whole = "epsilon is the whole budget: a charge has no published release (a crash, or a release under way)"
    protected = [(plan.unit.value, plan.claimed(spend), spend.delta)]
    if plan.tiers:
        units = [f"{plan.unit.value} (declared epsilon {tier.budget.epsilon:g})" for tier in plan.tiers]
        epsilons = [plan.epsilon_of(tier, plan.rounds) for tier in plan.tiers]  # more charges than rounds are refused
        protected = [(unit, e, tier.budget.delta) for unit, e, tier in zip(units, epsilons, plan.tiers, strict=True)]
    covered = tuple(
        StatementRow(
            adversary=adversary,
            unit=unit,
            relation=RELATION,
            epsilon=None if insecure else epsilon,
            delta=None if insecure else delta,
            assumptions=seed if insecure else (*assumptions, whole, *notes),
        )
        for adversary, assumptions in adversaries.items()
        for unit, epsilon, delta in protected
    )
    if plan.trust is not Trust.CENTRAL:
        return covered
    seen = ("under trust = central the server sees un-noised contributions",)
    server_row = replace(covered[0], adversary="the server", unit=plan.unit.value, epsilon=None, delta=None, assumptions=seen)
    return (*covered, server_row)
