"""A run on the terminal: bars where somebody watches, about ten lines where nobody does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Self, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dp_federated_lora.monitoring import wording

if TYPE_CHECKING:
    from dp_federated_lora.federated.round import RoundReport


@final
class ProgressBoard:
    """Shows the rounds of a run, its budget and its latest utility on public data; a context manager.

    Args:
        budget_epsilon: The budget of the run.
        console: Where to; the standard error stream by default, so that piped output stays clean.
        clock: Seconds that never run backwards.

    """

    def __init__(
        self,
        *,
        budget_epsilon: float,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget_epsilon
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._started = self._rounds_started = clock()
        self._first_round = 0
        self._phase = "starting"
        self._tenths_shown = -1
        self._report: RoundReport | None = None
        self._metrics: Mapping[str, float] = {}
        self._live = Live(console=self._console, get_renderable=self._board, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def show_phase(self, phase: str, done: float) -> None:
        """Show work outside of rounds, such as preparing examples, and the share of it that is done."""
        news = phase != self._phase
        self._phase = f"{phase} {done:.0%}" if done else phase
        self._rounds_started = self._clock()
        if self._console.is_terminal:
            self._live.refresh()
        elif news and not done:
            self._console.print(Text(phase), soft_wrap=True)

    def update(self, report: RoundReport) -> None:
        """Show `report`, the latest round."""
        # a resumed run starts in the middle: its pace counts the rounds of this process only
        self._first_round = self._first_round or report.round
        self._phase = ""
        self._metrics = report.public_metrics or report.private_metrics or self._metrics
        self._report = report
        tenths = 10 * report.round // report.rounds
        if self._console.is_terminal:
            self._live.refresh()
        elif tenths > self._tenths_shown:
            self._tenths_shown = tenths
            line = f"round {report.round}/{report.rounds} | {self._facts(report)} | {self._times(report)}"
            self._console.print(Text(line), soft_wrap=True)

    def _board(self) -> Group:
        report = self._report
        if report is None:
            return Group(Text(self._phase))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"round {report.round}/{report.rounds}", style="bold"),
            ProgressBar(total=report.rounds, completed=report.round, width=32),
            Text(f"{report.round / report.rounds:.0%}"),
        )
        return Group(bar, Text(self._facts(report)), Text(self._phase or self._times(report), style="dim"))

    def _facts(self, report: RoundReport) -> str:
        ratio = report.update_norm / report.noise_norm if report.noise_norm > 0 else math.nan
        # the ratio is the one sign of learning that costs no budget and no public data
        parts = [f"signal/noise {ratio:.2f}" if math.isfinite(ratio) else f"signal/noise {wording.MISSING}"]
        parts.append(f"epsilon {wording.rounded_up(report.epsilon)}/{self._budget:g}")
        for name in wording.leading_metrics(self._metrics)[:1]:
            value = wording.metric_text(name, self._metrics[name])
            parts.append(f"{wording.metric_label(name).lower()} {value}")
        return " | ".join(parts)

    def _times(self, report: RoundReport) -> str:
        now = self._clock()
        elapsed = now - self._started
        done = report.round - self._first_round + 1
        left = (now - self._rounds_started) / done * (report.rounds - report.round)
        return f"elapsed {timedelta(seconds=round(elapsed))} | left {timedelta(seconds=round(left))}"
