"""Numbers and foreign text as people read them; shared by the page, the statement and the terminal."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Mapping
from decimal import ROUND_CEILING, Context

MISSING = "n/a"
"""What stands where a number is missing or not finite."""

_LABELS = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "perplexity": "Perplexity", "loss": "Loss"}
_LEADING = ("accuracy", "macro_f1", "perplexity")


def rounded_up(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits, never below `value`: a printed bound stays a bound.

    >>> rounded_up(2.94001)
    '2.941'
    """
    if not math.isfinite(value):
        return MISSING
    bound = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value))
    return f"{float(bound):g}".replace("e-0", "e-")


def one_in(probability: float) -> str:
    """Return a small probability as `1 in 100,000`, empty where that says nothing.

    >>> one_in(1e-5)
    '1 in 100,000'
    """
    if not 1e-18 < probability <= 0.1:
        return ""
    return f"1 in {math.floor(1 / probability + 1e-6):,}"


def is_share(metric: str) -> bool:
    """Tell metrics between 0 and 1 that are read as percentages from others."""
    return metric.endswith(("accuracy", "f1"))


def metric_label(metric: str) -> str:
    """Name a metric for people.

    >>> metric_label("top5_accuracy")
    'Top5 accuracy'
    """
    return _LABELS.get(metric) or metric.replace("_", " ").capitalize()


def metric_text(metric: str, value: float) -> str:
    """Format the value of a metric for people.

    >>> metric_text("accuracy", 0.9123)
    '91.2 %'
    """
    if not math.isfinite(value):
        return MISSING
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.4g}"


def leading_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Pick the metrics a headline shows: the well-known ones, else the first."""
    return [name for name in _LEADING if name in metrics] or list(metrics)[:1]


def nice_ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that reach from `low` to `high` or beyond.

    With `whole` all ticks are integers.

    >>> nice_ticks(0.0, 2.9)
    [0.0, 1.0, 2.0, 3.0]
    """
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)) or span < 1e-90:
        pad = 0.1 * abs(low) if abs(low) > 1e-90 else 1.0
        low, span = low - pad, 2 * pad
        high = low + span
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def escaped(text: str) -> str:
    """`text` for HTML: markup escaped; what no HTML file may hold (surrogates, control codes) replaced."""
    kept = (c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} else "\ufffd" for c in text)
    return html.escape("".join(kept))
