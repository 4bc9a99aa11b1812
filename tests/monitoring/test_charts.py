from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.monitoring.charts import Series, line_chart
from dp_federated_lora.monitoring.wording import nice_ticks


def chart(*series, **options):
    text = line_chart(key="k", title="T", caption="C", series=series, x_end=10, y_text=lambda y: f"{y:g}", **options)
    return ElementTree.fromstring(text)


def line(*ys, style="s0"):
    return Series(label="L", style=style, points=list(enumerate(ys, start=1)))


def of_class(figure, name):
    return [node for node in figure.iter() if name in node.get("class", "").split()]


def test_a_chart_has_a_title_a_description_a_legend_and_a_table_of_its_numbers():
    figure = chart(line(0.5, 0.75))
    svg = figure.find("svg")
    names = {node.get("id"): node.text for node in svg if node.get("id")}
    assert svg.get("role") == "img"
    assert [names[key] for key in svg.get("aria-labelledby").split()] == ["T", "C"]
    assert [cell.text for cell in figure.find("details").iter("td")] == ["0.5", "0.75"]
    assert len(figure.find("ul")) == 1


@pytest.mark.parametrize("series", [(), (line(),), (line(math.nan, math.inf),)])
def test_without_a_drawable_point_the_chart_says_so(series):
    assert "No data" in ElementTree.tostring(chart(*series), encoding="unicode")


def test_a_single_point_is_a_mark_without_a_line():
    figure = chart(line(3.0))
    assert not of_class(figure, "line")
    assert len(of_class(figure, "mark")) == 1


def test_a_missing_value_is_a_gap_and_a_point_between_gaps_stays_visible():
    figure = chart(line(*[1.0] * 50, math.nan, 2.0, math.nan, *[3.0] * 50))
    assert [len(node.get("points").split()) for node in of_class(figure, "line")] == [50, 50]
    assert len(of_class(figure, "mark")) == 1
    assert "nan" not in ElementTree.tostring(figure.find("svg"), encoding="unicode")


def test_a_round_that_only_one_series_knows_is_not_available_in_the_other_column():
    figure = chart(line(1.0), Series(label="M", style="s1", points=[(2, 5.0)]))
    assert [cell.text for cell in figure.find("details").iter("td")] == ["1", "n/a", "n/a", "5"]


def test_a_long_run_is_drawn_as_one_line_without_thousands_of_marks():
    figure = chart(line(*(1 / k for k in range(1, 5001))))
    assert len(of_class(figure, "line")) == 1
    assert not of_class(figure, "mark")
    assert not of_class(figure, "hover")


@settings(deadline=None)  # the machine is shared
@given(ys=st.lists(st.floats(), max_size=30), percent=st.booleans(), from_zero=st.booleans())
def test_any_numbers_give_a_drawing_within_its_frame(ys, percent, from_zero):
    figure = chart(line(*ys), percent=percent, from_zero=from_zero)
    svg = figure.find("svg")
    _, _, width, height = map(float, svg.get("viewBox").split())
    for node in svg.iter():
        for name, limit in (("x", width), ("cx", width), ("x1", width), ("y", height), ("cy", height)):
            assert 0 <= float(node.get(name, "0")) <= limit
        for pair in node.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


@settings(deadline=None)  # the machine is shared
@given(low=st.floats(-1e90, 1e90), high=st.floats(-1e90, 1e90))
def test_ticks_are_few_even_and_cover_the_range(low, high):
    low, high = sorted((low, high))
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * max(high - low, abs(low), abs(high), 1e-90)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert min(steps) > 0
    assert all(math.isclose(step, steps[0], rel_tol=1e-2) for step in steps)


@settings(deadline=None)  # the machine is shared
@given(first=st.integers(0, 10**7), length=st.integers(1, 10**7))
def test_whole_ticks_are_few_integers_that_cover_the_range(first, length):
    ticks = nice_ticks(first, first + length, whole=True)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= first
    assert ticks[-1] >= first + length
    assert all(tick == round(tick) for tick in ticks)


def test_tick_labels_have_no_floating_point_tails():
    labels = [node.text for node in chart(line(0.1, 0.7)).find("svg").iter("text")]
    assert all(len(label) <= 5 for label in labels)
    assert re.search(r"0 % 20 % 40 % 60 % 80 %", " ".join(t.text for t in chart(line(0.1, 0.7), percent=True).iter("text")))
