from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from dp_federated_lora.monitoring.progress import ProgressBoard


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def shown(reports, *, terminal=False, seconds=1.0, width=100):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    clock = Clock()
    with ProgressBoard(budget_epsilon=3.0, console=console, clock=clock) as board:
        for one in reports:
            clock.now += seconds
            board.update(one)
    return console.file.getvalue()


def test_without_a_terminal_a_long_run_prints_about_ten_lines(report):
    text = shown([report(k, rounds=200) for k in range(1, 201)])
    lines = text.splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("round 1/200")
    assert lines[-1].startswith("round 200/200")
    assert "\x1b" not in text


def test_a_short_run_prints_every_round(report):
    assert len(shown([report(k, rounds=3) for k in range(1, 4)]).splitlines()) == 3


def test_a_line_has_ratio_budget_public_accuracy_elapsed_and_remaining_time(report):
    line = shown([report(5, public_metrics={"accuracy": 0.912, "macro_f1": 0.8})], seconds=60, width=40)
    assert line == ("round 5/10 | signal/noise 1.50 | epsilon 1.25/3 | accuracy 91.2 % | elapsed 0:01:00 | left 0:05:00\n")


def test_the_latest_public_metric_stays_until_there_is_a_newer_one(report):
    rounds = [
        report(1, public_metrics={"accuracy": 0.5}),
        report(2),
        report(3, public_metrics={"accuracy": 0.7}),
    ]
    lines = shown(rounds).splitlines()
    assert ["50.0 %" in lines[0], "50.0 %" in lines[1], "70.0 %" in lines[2]] == [True] * 3


def test_the_remaining_time_of_a_resumed_run_counts_its_own_rounds_only(report):
    lines = shown([report(8), report(9)], seconds=30).splitlines()
    assert lines[-1].endswith("elapsed 0:01:00 | left 0:00:30")


def test_without_noise_or_with_an_undefined_norm_the_ratio_is_not_available(report):
    lines = shown([report(1, noise_norm=0.0), report(2, update_norm=math.nan)]).splitlines()
    assert all("signal/noise n/a" in line for line in lines)


def test_a_metric_name_with_markup_is_printed_as_it_is(report):
    assert "[bold]x" in shown([report(1, public_metrics={"[bold]x": 1.0})])


def test_on_a_terminal_the_board_shows_a_bar_and_ends_on_the_last_round(report):
    text = shown([report(k) for k in range(1, 11)], terminal=True)
    assert "starting" in text
    assert "round 10/10" in text
    assert "100%" in text
    assert "epsilon 2.5/3" in text
    assert "━" in text


def test_an_error_inside_the_run_passes_through_and_restores_the_terminal(report):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with pytest.raises(KeyError), ProgressBoard(budget_epsilon=3.0, console=console) as board:
        board.update(report(1))
        raise KeyError("stop")
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("terminal", [False, True])
def test_work_outside_of_rounds_is_shown_and_does_not_count_into_their_pace(report, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    clock = Clock()
    with ProgressBoard(budget_epsilon=3.0, console=console, clock=clock) as board:
        board.show_phase("preparing examples", 0.0)
        clock.now += 500
        board.show_phase("preparing examples", 0.5)
        clock.now += 10
        board.update(report(1))
        board.show_phase("scoring the test data", 0.0)
    text = console.file.getvalue()
    assert "preparing examples" in text
    assert ("preparing examples 50%" in text) == terminal
    assert "elapsed 0:08:30 | left 0:01:30" in text
    assert "scoring the test data" in text
