"""What a site takes part in: its own policy.toml, checked where the data are. Everything that it does not allow is refused."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, final

from pydantic import Field, ValidationError, model_validator

from dp_federated_lora.errors import ConfigError, PolicyRefused
from dp_federated_lora.lab.config import explained
from dp_federated_lora.lab.sections import Count, Positive, Section
from dp_federated_lora.network.offer import Offer
from dp_federated_lora.privacy import Budget, DpEvent, Ledger, RenyiFilter, Scope

Delta = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(strict=False)]


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """One rule that an offer breaks; reads as a sentence.

    Args:
        rule: its key in policy.toml.
        allowed: the number, names or truth value that it allows.
        asked: the one that was asked for.
        reason: both in words.
    """

    rule: str
    allowed: float | bool | tuple[str, ...]
    asked: float | bool | str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


class DataSetRules(Section):
    """[[data_set]]: what one data set may be used for, and its budget over all runs.

    Each of `purposes` ("training", "evaluation") has a ledger of its own with this budget: what the data set can lose in all is
    their sum. For a purpose with another budget, give the same `name` again.
    """

    name: Name
    purposes: Names
    epsilon: Positive
    delta: Delta

    def lifetime_epsilon(self, events: Sequence[DpEvent]) -> float:
        """What `events` would cost a ledger of this budget that is still empty, as that ledger counts."""
        total = RenyiFilter.for_budget(self.epsilon, self.delta)
        for event in events:
            total = total.with_event(event)
        return total.epsilon(self.delta)


class PlanRules(Section):
    """[plan]: limits of one run.

    `max_epsilon` and `max_delta` hold for the run and for each of its groups; `min_noise_multiplier` for whatever it releases.
    `models` are SHA-256 of base models, as `model_id` computes them here and `dpfl policy check` prints: a source is only a name,
    behind which somebody else can change the files, and a path means another folder on each machine.

    `min_opened` is the fewest participants whose sum may be opened: above 1 it refuses trust = "central" and "local" alike, where
    contributions arrive one by one. `allow_insecure_seed` is for rehearsals on public data: NOT PRIVATE.
    """

    max_epsilon: Positive
    max_delta: Delta
    min_noise_multiplier: Positive
    min_participants: Count
    min_opened: Count
    units: Annotated[tuple[Literal["example", "client"], ...], Field(strict=False)]
    trusts: Annotated[tuple[Literal["central", "local", "distributed"], ...], Field(strict=False)]
    methods: Names
    models: Annotated[tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...], Field(strict=False)]
    secure_aggregation: bool
    allow_insecure_seed: bool = False

    def refusals(self, offer: Offer) -> Iterator[Refusal]:
        """Every limit that an offer breaks."""
        plan, z = offer.plan, offer.plan.mechanism.noise_multiplier
        epsilons = {"the run": max(plan.budget.epsilon, plan.epsilon_after(plan.rounds))}
        deltas, noises = {"the run": plan.budget.delta}, {"training": z}
        for number, tier in enumerate(plan.tiers, start=1):
            epsilons[f"group {number}"] = max(tier.budget.epsilon, plan.epsilon_of(tier, plan.rounds))
            deltas[f"group {number}"] = tier.budget.delta
            noises[f"group {number}"] = z / tier.clip_share
        if plan.evaluation is not None:
            noises["evaluation"] = plan.evaluation.noise_multiplier
        yield from _at_most("plan.max_epsilon", "epsilon", self.max_epsilon, epsilons)
        yield from _at_most("plan.max_delta", "delta", self.max_delta, deltas)
        yield from _at_least("plan.min_noise_multiplier", "the noise multiplier", self.min_noise_multiplier, noises)
        people = {"the run": offer.participants}
        yield from _at_least("plan.min_participants", "the number of participants", self.min_participants, people)
        opened = {"the run": offer.opened}
        yield from _at_least("plan.min_opened", "the number of participants whose sum is opened", self.min_opened, opened)
        yield from _among("plan.units", "the privacy unit", self.units, plan.unit.value)
        yield from _among("plan.trusts", "the trust", self.trusts, plan.trust.value)
        yield from _among("plan.methods", "the method", self.methods, offer.method)
        yield from _among("plan.models", "the base model's SHA-256", self.models, offer.model)
        if self.secure_aggregation and plan.trust.value != "distributed":
            reason = (
                f'contributions must be added by secure aggregation (trust = "distributed"), not by "{plan.trust.value}" trust'
            )
            yield Refusal("plan.secure_aggregation", True, False, reason)
        if offer.seeded and not self.allow_insecure_seed:
            reason = "the noise comes from a seed, so whoever knows that can take it away"
            yield Refusal("plan.allow_insecure_seed", False, True, reason)


class PeopleRules(Section):
    """[people]: who may submit runs to this site. To stop one, coordinators need nobody's leave: they ask no more."""

    submit: Names


class SitePolicy(Section):
    """A whole policy.toml; every key must be there but `plan.allow_insecure_seed`, and an empty list allows nothing.

    ```toml
    [[data_set]]
    name = "newswires"
    purposes = ["training", "evaluation"]
    epsilon = 20.0
    delta = 1e-5

    [plan]
    max_epsilon = 8.0
    max_delta = 1e-5
    min_noise_multiplier = 0.5
    min_participants = 10
    min_opened = 8
    units = ["example"]
    trusts = ["distributed"]
    methods = ["ffa"]
    models = ["2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"]
    secure_aggregation = true

    [people]
    submit = ["alice"]
    ```
    """

    data_set: Annotated[tuple[DataSetRules, ...], Field(strict=False)]
    plan: PlanRules
    people: PeopleRules

    @model_validator(mode="after")
    def _one_budget_each(self) -> Self:
        pairs = [(rules.name, purpose) for rules in self.data_set for purpose in rules.purposes]
        for name, purpose in pairs:
            if pairs.count((name, purpose)) > 1:
                raise ValueError(f'data_set: "{name}" has two budgets for "{purpose}"; keep one of them')
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a policy.

        Raises:
            ConfigError: if there is none, or naming the file and every key at fault.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ConfigError(f"there is no policy at {path}, and a site without one joins nothing: write it") from error
        except OSError as error:
            raise ConfigError(f"cannot read the policy {path}: {error.strerror}; nothing is joined without it") from error
        except ValidationError as error:
            raise ConfigError(f"the policy {path} cannot be used, and nothing is joined without it:{explained(error)}") from error
        except ValueError as error:  # of TOML or UTF-8
            raise ConfigError(f"the policy {path} is not valid TOML: {error}; nothing is joined without it") from error

    def refusals(self, offer: Offer) -> tuple[Refusal, ...]:
        """Every rule that an offer breaks, all at once; empty if the site takes part.

        Raises:
            UnsupportedEvent: if an event of its plan cannot be charged to a lifetime budget.
        """
        return (
            *_among("people.submit", "who submits", self.people.submit, offer.submitter),
            *self._data_set_refusals(offer),
            *self.plan.refusals(offer),
        )

    def admit(self, offer: Offer) -> None:
        """Let an offer pass or not.

        Raises:
            PolicyRefused: naming every rule that it breaks.
        """
        if found := self.refusals(offer):
            lines = "".join(f"\n  {refusal}" for refusal in found)
            raise PolicyRefused(f"the policy of this site does not allow the run; change the run, or ask the site:{lines}")

    def open_ledgers(self, database: Path, offer: Offer, *, key: Path | None = None) -> dict[str, Ledger]:
        """The lifetime ledger of the offer's data set for each of its purposes, to be charged by `Ledger.charge_all`.

        One ledger counts one privacy unit: that of the first run charged to it.

        Args:
            database: the site's own file of ledgers.
            offer: a run that the policy admits.
            key: file of the key that signs them; default beside the database, with suffix .key.

        Raises:
            PolicyRefused: if the policy does not admit it; no ledger is made.
            BudgetMismatch: if a ledger was made for another budget or unit: the policy cannot raise one later.
            LedgerCorrupt, LedgerKeyLost, LedgerLocked, StorageError: as `Ledger.open_all`.
        """
        self.admit(offer)
        ledgers = {}
        for purpose in offer.purposes:
            rules = self._rules_of(offer.data_set, purpose)
            assert rules is not None  # noqa: S101  (the offer was admitted)
            (ledgers[purpose],) = Ledger.open_all(
                database,
                [f"{offer.data_set} / {purpose}"],
                budget=Budget(rules.epsilon, rules.delta),
                scope=Scope.LIFETIME,
                unit=offer.plan.unit.value,
                key=key,
            )
        return ledgers

    def _rules_of(self, data_set: str, purpose: str) -> DataSetRules | None:
        return next((rules for rules in self.data_set if rules.name == data_set and purpose in rules.purposes), None)

    def _data_set_refusals(self, offer: Offer) -> Iterator[Refusal]:
        """One for each purpose at most: it is not allowed, or the run alone costs more than the whole budget."""
        known = tuple(dict.fromkeys(rules.name for rules in self.data_set))
        allowed = tuple(purpose for rules in self.data_set if rules.name == offer.data_set for purpose in rules.purposes)
        for purpose, events in offer.purposes.items():
            rules = self._rules_of(offer.data_set, purpose)
            if rules is not None:
                costs = {f"{purpose} alone": rules.lifetime_epsilon(events)}
                words = f'the lifetime epsilon of "{offer.data_set}" for {purpose}, at delta {rules.delta!r},'
                yield from _at_most("data_set.epsilon", words, rules.epsilon, costs)
            elif offer.data_set in known:
                yield from _among("data_set.purposes", f'the purpose of using "{offer.data_set}"', allowed, purpose)
            else:
                yield from _among("data_set.name", f"the data set for {purpose}", known, offer.data_set)


# Comparisons are written so that a NaN is refused.


def _at_most(rule: str, what: str, limit: float, asked: Mapping[str, float]) -> Iterator[Refusal]:
    """The worst of those `asked`, by where it is, if it is above the limit."""
    beyond = {where: value for where, value in asked.items() if not value <= limit}
    if beyond:
        where = max(beyond, key=lambda key: beyond[key])
        yield Refusal(rule, limit, beyond[where], f"{what} is at most {limit!r} here, and {where} has {beyond[where]!r}")


def _at_least(rule: str, what: str, limit: float, asked: Mapping[str, float]) -> Iterator[Refusal]:
    """The worst of those `asked`, by where it is, if it is below the limit."""
    beyond = {where: value for where, value in asked.items() if not value >= limit}
    if beyond:
        where = min(beyond, key=lambda key: beyond[key])
        yield Refusal(rule, limit, beyond[where], f"{what} is at least {limit!r} here, and {where} has {beyond[where]!r}")


def _among(rule: str, what: str, allowed: tuple[str, ...], asked: str) -> Iterator[Refusal]:
    """A refusal if what is `asked` is not in the list."""
    if asked not in allowed:
        names = " or ".join(f'"{name}"' for name in allowed) or "nothing: its list is empty"
        yield Refusal(rule, allowed, asked, f'{what} is "{asked}", and this site allows {names}')
