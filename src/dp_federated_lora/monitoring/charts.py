"""Line charts as inline SVG, with the same numbers as a table for whoever cannot see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_federated_lora.monitoring.wording import MISSING, escaped, nice_ticks

_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 44
_INSET = 8  # room for the mark of the first and the last point
_MARKED, _HOVERED = 40, 400
_LARGEST = 1e100

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart: its name, a CSS class (`s0`, `s1`, `s2` or `ref`) and its points by x.

    A y that is not finite leaves a gap.
    """

    label: str
    style: str
    points: Sequence[Point]


def line_chart(
    *,
    key: str,
    title: str,
    caption: str,
    series: Sequence[Series],
    x_end: float,
    y_text: Callable[[float], str],
    percent: bool = False,
    from_zero: bool = False,
) -> str:
    """Return a `<figure>`: heading, legend, titled and described SVG, caption and a table of all numbers.

    Args:
        key: Prefix of the ids in this figure; unique on the page.
        title: Heading, and title of the SVG.
        caption: One or two sentences on how to read it; also the description of the SVG.
        series: The lines; empty, one-point and partly undefined ones are fine.
        x_end: Where the x axis ends at the earliest; it starts at the first point.
        y_text: Formats the y values.
        percent: Label the y axis in percent.
        from_zero: Start the y axis at 0.

    """
    drawn = [(x, y) for line in series for x, y in line.points if _drawable(y)]
    body = f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">No data</text>'
    if drawn:
        body = _plot(series, drawn, x_end=x_end, y_text=y_text, percent=percent, from_zero=from_zero)
    legend = "".join(f'<li><span class="key {s.style}"></span>{escaped(s.label)}</li>' for s in series)
    return (
        f'<figure class="chart"><h3>{escaped(title)}</h3><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escaped(title)}</title><desc id="{key}-desc">{escaped(caption)}</desc>'
        f"{body}</svg><figcaption>{escaped(caption)}</figcaption>"
        f'<details><summary>Figures as a table</summary><div class="scroll">{_table(series, y_text)}</div>'
        f"</details></figure>"
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _plot(
    series: Sequence[Series],
    drawn: Sequence[Point],
    *,
    x_end: float,
    y_text: Callable[[float], str],
    percent: bool,
    from_zero: bool,
) -> str:
    x_low, x_high = min(x for x, _ in drawn), max(x_end, *(x for x, _ in drawn))
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    lowest = min(y for _, y in drawn)
    y_ticks = nice_ticks(min(0.0, lowest) if from_zero else lowest, max(y for _, y in drawn))

    def at(x: float, y: float) -> tuple[str, str]:
        right = _LEFT + _INSET + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT - 2 * _INSET)
        down = _TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{right:.1f}", f"{down:.1f}"

    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts = [f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">round</text>']
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        label = f"{100 * tick:.6g} %" if percent else f"{tick:.6g}"
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="0.35em" text-anchor="end">{label}</text>')
    for tick in nice_ticks(x_low, x_high, whole=True):
        if x_low <= tick <= x_high:
            x, _ = at(tick, y_ticks[0])
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:.10g}</text>')
    for line in series:
        parts.extend(_strokes(line, at, y_text))
    return "".join(parts)


def _strokes(line: Series, at: Callable[[float, float], tuple[str, str]], y_text: Callable[[float], str]) -> list[str]:
    runs: list[list[Point]] = [[]]
    for x, y in line.points:
        if _drawable(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    parts = [
        f'<polyline class="line {line.style}" points="{" ".join(",".join(at(x, y)) for x, y in run)}"/>'
        for run in runs
        if len(run) > 1
    ]
    # a point with gaps on both sides is visible only as a mark
    lone = {run[0] for run in runs if len(run) == 1}
    marked = line.style != "ref" and len(line.points) <= _MARKED
    for x, y in (point for run in runs for point in run) if len(line.points) <= _HOVERED else lone:
        right, down = at(x, y)
        if marked or (x, y) in lone:
            parts.append(f'<circle class="mark {line.style}" cx="{right}" cy="{down}" r="3"/>')
        tip = escaped(f"{line.label}, round {x:.10g}: {y_text(y)}")
        parts.append(f'<circle class="hover" cx="{right}" cy="{down}" r="8"><title>{tip}</title></circle>')
    return parts


def _table(series: Sequence[Series], y_text: Callable[[float], str]) -> str:
    columns = [dict(line.points) for line in series]
    head = "".join(f'<th scope="col">{escaped(line.label)}</th>' for line in series)
    rows = "".join(
        f'<tr><th scope="row">{x:.10g}</th>'
        + "".join(f"<td>{escaped(y_text(column[x])) if x in column else MISSING}</td>" for column in columns)
        + "</tr>"
        for x in sorted(set().union(*columns))
    )
    return f'<table><thead><tr><th scope="col">Round</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
