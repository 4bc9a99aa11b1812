"""The report of a run: one HTML file without scripts, fonts or network, to send to anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, final

from dp_federated_lora.monitoring.charts import Series, line_chart
from dp_federated_lora.monitoring.statement import NO_STATEMENT, NOT_PRIVATE, StatementRow, guarantee, row_in_words
from dp_federated_lora.monitoring.style import STYLE_SHEET
from dp_federated_lora.monitoring.wording import (
    escaped,
    is_share,
    leading_metrics,
    metric_label,
    metric_text,
    one_in,
    rounded_up,
)

if TYPE_CHECKING:
    from dp_federated_lora.federated.round import RoundReport

TRAINED_SHARE: Final = "trained share"
"""The key of `facts` that the headline shows."""

_UTILITY: Final = "Measured on test data declared public, in the rounds with an evaluation. It costs no privacy budget."
_HELD_OUT: Final = "Measured on examples that participants never trained on, with noise that is charged to the same budget."
_EPSILON: Final = (
    "Charged to the ledger before each release, with the pessimistic bound. "
    "A round that would cross the dashed line does not start."
)
_NORMS: Final = (
    "A released update is the true mean update plus noise; the dashed line is the norm expected of the noise "
    "alone. A ratio near 1 means that the round released mostly noise. Both numbers are public."
)
_AUDIT: Final = (
    "Canaries, known contributions that took part by the toss of a coin, went through this run like any other unit. How often "
    "their coins could be guessed from what was released shows an epsilon that the run has at least. It shows far less than "
    "it might, so a bound below the claim is no proof of the claim; a bound above it is a proof that the claim is wrong."
)
_VOID: Final = " In this run the noise came from a fixed seed, so the number protects nobody."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFigures:
    """What an audit of the run found: epsilon as charged, and the lower bound shown by `canaries` at `confidence`."""

    claimed: float
    lower_bound: float
    confidence: float
    canaries: int


def render_report(
    *,
    title: str,
    config_toml: str,
    reports: Sequence[RoundReport],
    statement: Sequence[StatementRow],
    budget_epsilon: float,
    facts: Mapping[str, str],
    final_metrics: Mapping[str, float],
    insecure: bool,
    audit: AuditFigures | None = None,
) -> str:
    """Return the page as text; equal arguments give equal pages.

    Args:
        title: The name of the run.
        config_toml: The resolved configuration.
        reports: The finished rounds in order.
        statement: The privacy statement of what was executed.
        budget_epsilon: The budget that the run may spend.
        facts: Further public facts, shown in order; `"trained share"` is also shown as a headline.
        final_metrics: Utility of the final adapter on public test data.
        insecure: The noise came from a seed: say so everywhere.
        audit: What an audit of this run found; None where there was none.

    """
    banner = f'<p class="banner" role="alert">{NOT_PRIVATE}</p>' if insecure else ""
    tiles = _tiles(reports, statement, budget_epsilon, facts, final_metrics, insecure=insecure)
    charts = _charts(reports, budget_epsilon, insecure=insecure)
    numbers = {f"{metric_label(name)}, final": metric_text(name, v) for name, v in final_metrics.items()}
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>'
        for name, value in (numbers | dict(facts)).items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escaped(title)}: run report</title>
<style>{STYLE_SHEET}</style>
</head>
<body>
{banner}
<header>
<p class="eyebrow">Federated LoRA fine-tuning with differential privacy</p>
<h1>{escaped(title)}</h1>
<p class="lead">{_progress(reports)}</p>
</header>
<main>
<section aria-label="Headline numbers"><dl class="tiles">{tiles}</dl></section>
<section><h2>Rounds</h2><div class="charts">{charts}</div></section>
<section><h2>Who can learn what</h2>{_statement(statement, insecure=insecure)}</section>
{_audit(audit)}<section><h2>Facts</h2><div class="facts"><table><tbody>{rows}</tbody></table></div></section>
<section><h2>Configuration</h2><pre>{escaped(config_toml)}</pre></section>
</main>
<footer>Everything on this page is a public fact, a released value, or measured on public data.</footer>
</body>
</html>
"""


def _progress(reports: Sequence[RoundReport]) -> str:
    if not reports:
        return "No round was finished."
    last = reports[-1]
    if last.round >= last.rounds:
        return f"All {last.rounds:,} rounds finished."
    return f"{last.round:,} of {last.rounds:,} rounds finished."


def _tiles(
    reports: Sequence[RoundReport],
    statement: Sequence[StatementRow],
    budget: float,
    facts: Mapping[str, str],
    final_metrics: Mapping[str, float],
    *,
    insecure: bool,
) -> str:
    tiles = [
        _tile(metric_label(name), metric_text(name, final_metrics[name]), "final, on public test data")
        for name in leading_metrics(final_metrics)
    ]
    charged = reports[-1].epsilon if reports else 0.0
    claimed = max((bound[0] for row in statement if (bound := guarantee(row))), default=None)
    if insecure:
        tiles.append(_tile("Epsilon", "void", "the noise came from a fixed seed", css="bad"))
    elif claimed is not None:
        note = f"{rounded_up(charged)} charged, of a budget of {budget:g}"
        tiles.append(_tile("Epsilon", rounded_up(claimed), note, meter=_meter(charged, budget)))
    if reports and not insecure:
        tiles.append(_tile("Delta", rounded_up(reports[-1].delta), one_in(reports[-1].delta)))
    if statement:
        units = ", ".join(dict.fromkeys(row.unit for row in statement))
        relations = ", ".join(dict.fromkeys(row.relation for row in statement))
        tiles.append(
            _tile("Protected unit", "none", "see the warning", css="bad")
            if insecure
            else _tile("Protected unit", units, relations)
        )
    if TRAINED_SHARE in facts:
        tiles.append(_tile("Trained share", facts[TRAINED_SHARE], "of the model's parameters"))
    return "".join(tiles)


def _tile(label: str, value: str, note: str, *, meter: str = "", css: str = "") -> str:
    return (
        f'<div class="tile {css}"><dt>{escaped(label)}</dt><dd class="value">{escaped(value)}</dd>'
        f'<dd class="note">{meter}{escaped(note)}</dd></div>'
    )


def _meter(spent: float, budget: float) -> str:
    if not (budget > 0 and math.isfinite(budget) and math.isfinite(spent)):
        return ""
    share = min(100.0, 100 * spent / budget)
    return f'<span class="meter" aria-hidden="true"><span style="width:{share:.1f}%"></span></span>'


def _audit(audit: AuditFigures | None) -> str:
    if audit is None:
        return ""
    top = max(audit.claimed, audit.lower_bound)
    contradicted = audit.lower_bound > audit.claimed
    shown = rounded_up(-audit.lower_bound).removeprefix("-")  # a lower bound is rounded down
    claimed = _tile("Epsilon claimed", rounded_up(audit.claimed), "as charged", meter=_meter(audit.claimed, top))
    found = _tile(
        "Epsilon shown, at least",
        shown,
        f"with {audit.canaries:,} canaries, at {audit.confidence:.4g} confidence: {'FAIL' if contradicted else 'PASS'}",
        meter=_meter(audit.lower_bound, top),
        css="bad" if contradicted else "",
    )
    return f'<section><h2>Audit</h2><dl class="tiles">{claimed}{found}</dl><p>{_AUDIT}</p></section>\n'


def _charts(reports: Sequence[RoundReport], budget: float, *, insecure: bool) -> str:
    public = [(report.round, report.public_metrics) for report in reports]
    private = [(report.round, report.private_metrics) for report in reports]
    charts = _utility("utility", "public test data", _UTILITY, public, _end(reports))
    if any(scores for _, scores in private):
        charts += _utility("held-out", "participants' held-out data", _HELD_OUT, private, _end(reports))
    ends = sorted({reports[0].round, reports[-1].rounds}) if reports else []
    limit = [(x, budget) for x in ends] if math.isfinite(budget) else []
    charts.append(
        line_chart(
            key="epsilon",
            title="Epsilon charged",
            caption=_EPSILON + (_VOID if insecure else ""),
            series=[
                Series(label="Charged", style="s0", points=[(r.round, r.epsilon) for r in reports]),
                Series(label="Budget", style="ref", points=limit),
            ],
            x_end=_end(reports),
            y_text=rounded_up,
            from_zero=True,
        )
    )
    charts.append(
        line_chart(
            key="norms",
            title="Released update and its noise",
            caption=_NORMS,
            series=[
                Series(label="Update norm", style="s0", points=[(r.round, r.update_norm) for r in reports]),
                Series(
                    label="Expected noise norm",
                    style="ref",
                    points=[(r.round, r.noise_norm) for r in reports],
                ),
            ],
            x_end=_end(reports),
            y_text=lambda value: metric_text("norm", value),
            from_zero=True,
        )
    )
    return "".join(charts)


def _utility(key: str, source: str, caption: str, scores: Sequence[tuple[int, Mapping[str, float]]], end: int) -> list[str]:
    """Charts of all scores of one source by round."""
    names = list(dict.fromkeys(name for _, values in scores for name in values))
    shares = [name for name in names if is_share(name)]
    # percentages share one chart; a perplexity beside them would flatten both
    groups = [shares] if shares or not names else []
    groups += [[name] for name in names if not is_share(name)]
    charts = []
    for number, group in enumerate(groups):
        percent = all(is_share(name) for name in group)
        charts.append(
            line_chart(
                key=f"{key}-{number}",
                title=f"{'Utility' if percent else metric_label(group[0])} on {source}",
                caption=caption,
                series=[
                    Series(
                        label=metric_label(name),
                        style=f"s{slot % 3}",
                        points=[(round_, values[name]) for round_, values in scores if name in values],
                    )
                    for slot, name in enumerate(group)
                ],
                x_end=end,
                y_text=partial(metric_text, "accuracy" if percent else group[0]),
                percent=percent,
            )
        )
    return charts


def _end(reports: Sequence[RoundReport]) -> int:
    return reports[-1].rounds if reports else 1


def _statement(statement: Sequence[StatementRow], *, insecure: bool) -> str:
    if not statement:
        return f"<p>{NO_STATEMENT}</p>"
    cards = []
    for row in statement:
        bound = None if insecure else guarantee(row)
        badge = "not private" if insecure else "no guarantee"
        if bound is not None:
            badge = f"epsilon {rounded_up(bound[0])}, delta {rounded_up(bound[1])}"
        cards.append(
            f'<article class="card{" bad" if bound is None else ""}"><h3>Against {escaped(row.adversary)}'
            f'<span class="badge">{badge}</span></h3>'
            f"<p>{escaped(row_in_words(row, insecure=insecure))}</p></article>"
        )
    return "".join(cards)
