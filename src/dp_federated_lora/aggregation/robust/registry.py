"""Names of rules and of what may come before them, what each can bear, and what applies them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

from torch import Tensor

from dp_federated_lora.aggregation.robust import preaggregators, rules
from dp_federated_lora.aggregation.robust.coordinates import meamed, median, trimmed_mean
from dp_federated_lora.aggregation.robust.updates import Updates
from dp_federated_lora.errors import AggregationError


class Stage(NamedTuple):
    """A rule, or what comes before one.

    Args:
        apply: called with points, f, and the parameters that its signature names.
        condition: on f bad points of n, in words.
        most: the largest f that it bears for n; below zero if n is too small for any.
        left: how many points a stage makes of n, given the parameters.
    """

    apply: Callable[..., Any]
    condition: str
    most: Callable[[int], int]
    left: Callable[[int, Mapping[str, Any]], int] = lambda n, _: n


def _searched(n: int) -> int:
    """The largest f below n / 2 for which there are few enough subsets of n - f to look at them all."""
    return next((f for f in range((n - 1) // 2, -1, -1) if math.comb(n, f) <= rules.MOST_SUBSETS), -1) if n else -1


_MINORITY: Final = ("2 f < n", lambda n: (n - 1) // 2)
_SUBSETS: Final = (f"2 f < n and at most {rules.MOST_SUBSETS:,} subsets of n - f", _searched)
_NOT_ALL: Final = ("f < n", lambda n: n - 1)

RULES: Final[Mapping[str, Stage]] = {
    "mean": Stage(rules.mean, "f = 0, n > 0", lambda n: min(n - 1, 0)),
    "median": Stage(median, *_MINORITY),
    "trimmed_mean": Stage(trimmed_mean, *_MINORITY),
    "meamed": Stage(meamed, *_MINORITY),
    "krum": Stage(rules.krum, *_MINORITY),
    "multi_krum": Stage(rules.multi_krum, *_MINORITY),
    "bulyan": Stage(rules.bulyan, "4 f + 3 <= n", lambda n: (n - 3) // 4),
    "geometric_median": Stage(rules.geometric_median, *_MINORITY),
    "centered_clipping": Stage(rules.centered_clipping, *_MINORITY),
    "mda": Stage(rules.mda, *_SUBSETS),
    "smea": Stage(rules.smea, *_SUBSETS),
    "caf": Stage(rules.caf, *_MINORITY),
    "dnc": Stage(rules.dnc, *_MINORITY),
    "fltrust": Stage(rules.fltrust, *_NOT_ALL),
}
BEFORE: Final[Mapping[str, Stage]] = {
    "nnm": Stage(preaggregators.nnm, *_MINORITY),
    "bucketing": Stage(preaggregators.bucketing, *_NOT_ALL, left=lambda n, given: math.ceil(n / given["bucket"])),
    "arc": Stage(preaggregators.arc, *_MINORITY),
    "clip": Stage(preaggregators.clip, *_NOT_ALL),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RobustAggregator:
    """A rule by name, what comes before it, and their parameters.

    Args:
        rule: a name in `RULES`.
        f: how many senders may be bad: a public assumption, never estimated from updates.
        before: names in `BEFORE`, in the order in which they are applied.
        parameters: by name, exactly those that the functions of these stages ask for (those with a default may be left out).

    Raises:
        AggregationError: if a name or parameter is unknown, one is missing, or a number is not positive.
    """

    rule: str
    f: int
    before: tuple[str, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, table, names in (("rule", RULES, (self.rule,)), ("stage before a rule", BEFORE, self.before)):
            if unknown := [name for name in names if name not in table]:
                raise AggregationError(f"there is no {kind} called {unknown[0]!r}; choose from {', '.join(table)}")
        if self.f < 0:
            raise AggregationError(f"f is a number of bad senders, got {self.f}; give 0 or more")
        asked = {name: p for stage in self._stages().values() for name, p in _parameters(stage).items()}
        missing = [name for name, p in asked.items() if p.default is p.empty and name not in self.parameters]
        if missing or not self.parameters.keys() <= asked.keys():
            raise AggregationError(
                f"{' + '.join(self._stages())} takes the parameters {sorted(asked)}, got {sorted(self.parameters)}"
                + (f"; {missing[0]!r} has no default" if missing else "; leave the others out")
            )
        for name, value in self.parameters.items():
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise AggregationError(f"{name} must be positive and finite, got {value}")
            if isinstance(value, float) and asked[name].annotation == "int":
                raise AggregationError(f"{name} is a whole number, got {value}")

    def require(self, n: int, f: int) -> None:
        """Raise AggregationError if f bad ones of n updates are more than a stage bears."""
        for name, stage in self._stages().items():
            if f > stage.most(n):
                raise AggregationError(
                    f"{name} needs {stage.condition}, but f = {f} of n = {n} updates may be bad: give an f of at most "
                    f"{max(stage.most(n), 0)}, collect more updates, or choose another rule"
                )
            n = stage.left(n, self.parameters)

    def __call__(self, updates: Updates) -> Tensor:
        """The aggregate `(d,)` float64 of the updates that have arrived.

        An update that was left out came from a bad sender, so as many fewer are among the others: senders of NaN can neither
        poison a rule nor stop it.

        Raises:
            AggregationError: if f is more than a stage bears.
        """
        f = max(self.f - updates.non_finite - updates.duplicates, 0)
        self.require(len(updates), f)
        result: Any = updates.points()
        for stage in self._stages().values():
            given = {key: value for key, value in self.parameters.items() if key in _parameters(stage)}
            result = stage.apply(result, f, **given)
        vector: Tensor = result
        return vector

    def _stages(self) -> dict[str, Stage]:
        return {name: BEFORE[name] for name in self.before} | {self.rule: RULES[self.rule]}


def _parameters(stage: Stage) -> dict[str, inspect.Parameter]:
    named = inspect.signature(stage.apply).parameters
    return {name: p for name, p in named.items() if p.kind is p.KEYWORD_ONLY}
