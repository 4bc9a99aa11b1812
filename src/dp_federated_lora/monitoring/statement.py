"""The privacy statement in sentences that somebody without statistics can read and hold us to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from dp_federated_lora.monitoring.wording import one_in, rounded_up

NOT_PRIVATE: Final = "NOT PRIVATE: noise came from a fixed seed"
"""The banner of every output of a run with seeded noise."""

NO_STATEMENT: Final = "No privacy statement was given: assume no guarantee against anybody."
"""What an empty statement says."""

_UNITS: Final = {
    "example": (
        "one example",
        "Somebody with several examples in the data is protected less: for k examples epsilon counts k times "
        "and delta grows too.",
    ),
    "client": ("one client with all of its data", "Everything that one client holds is covered as a whole."),
}
_WEAK_EPSILON: Final = 10.0
_LARGEST_FACTOR: Final = 1e6


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StatementRow:
    """What one adversary can learn.

    Args:
        adversary: who observes.
        unit: the protected unit.
        relation: the neighbouring relation.
        epsilon: pessimistic bound of what was executed; None means that nothing is guaranteed.
        delta: the same.
        assumptions: what the row rests on.
    """

    adversary: str
    unit: str
    relation: str
    epsilon: float | None
    delta: float | None
    assumptions: tuple[str, ...]


def guarantee(row: StatementRow) -> tuple[float, float] | None:
    """Return `(epsilon, delta)`, or None where `row` bounds nothing: a number is missing or no number."""
    epsilon, delta = row.epsilon, row.delta
    if epsilon is None or delta is None or not (0 <= epsilon < math.inf and 0 <= delta < 1):
        return None
    return epsilon, delta


def row_in_words(row: StatementRow, *, insecure: bool) -> str:
    r"""Write one paragraph: what an observer of the kind `row.adversary` can learn.

    The best guess between two equally likely neighbouring data sets is right with probability at most
    \((e^\varepsilon + \delta) / (1 + e^\varepsilon)\): the total variation distance under
    (epsilon, delta)-DP is at most \((e^\varepsilon - 1 + 2\delta) / (e^\varepsilon + 1)\)
    (Kairouz, Oh and Viswanath 2015, arXiv:1311.0776, from Theorem 2.1).
    """
    unit, scope = _UNITS.get(row.unit, (f"one {row.unit}", ""))
    basis = _basis(row)
    if insecure:
        return (
            f"No guarantee. The noise came from a fixed seed: whoever knows or guesses it can subtract the "
            f"noise, and then nothing limits what they can learn about {unit}."
        )
    bound = guarantee(row)
    if bound is None:
        silence = f"No guarantee. Nothing here limits what such an observer can learn about {unit}."
        return f"{silence} {basis}".rstrip()
    epsilon, delta = bound
    sentences = [
        f"The protected unit is {unit}.",
        f"The guarantee compares this run with a run on data that differ in that one unit (relation: {row.relation}).",
        f"Whatever else such an observer knows, what this run shows them changes their odds of one case "
        f"against the other by a factor of at most {_factor(epsilon)}{_exception(delta)}.",
        f"In other words: where both cases are equally likely beforehand, the best possible guess is right "
        f"at most {_best_guess(epsilon, delta)} of the time, and a blind guess 50 % of the time.",
        scope,
        "A bound this large is close to none." if epsilon >= _WEAK_EPSILON else "",
        basis,
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def statement_in_words(statement: Sequence[StatementRow], *, insecure: bool) -> str:
    """Write the whole statement as plain text, one paragraph per adversary, separated by empty lines."""
    paragraphs = [f"{NOT_PRIVATE}."] if insecure else []
    paragraphs += [f"Against {row.adversary}: {row_in_words(row, insecure=insecure)}" for row in statement]
    return "\n\n".join(paragraphs if statement else [*paragraphs, NO_STATEMENT])


def _basis(row: StatementRow) -> str:
    if not row.assumptions:
        return "It rests on no further assumption." if guarantee(row) else ""
    lead = "This rests on" if guarantee(row) else "Stated for this observer"
    return f"{lead}: {'; '.join(row.assumptions)}."


def _factor(epsilon: float) -> str:
    shown = rounded_up(epsilon)
    # math.exp overflows from 710 on, and nobody can picture a number of that size anyway
    if epsilon >= math.log(_LARGEST_FACTOR):
        return f"e^{shown}, more than a million"
    return f"e^{shown} = {float(rounded_up(math.exp(float(shown)))):,g}"


def _exception(delta: float) -> str:
    if delta == 0:
        return ""
    words = one_in(delta)
    return f", apart from an additional probability of at most {rounded_up(delta)}" + (f" ({words})" if words else "")


def _best_guess(epsilon: float, delta: float) -> str:
    shrunk = math.exp(-epsilon)  # e^-epsilon cannot overflow, e^epsilon can
    return f"{min(100.0, math.ceil(10_000 * (1 + delta * shrunk) / (1 + shrunk)) / 100):g} %"
