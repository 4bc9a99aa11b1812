"""What coordinator and site tell Prometheus: public facts and released values, and nothing that data was computed into.

Every program has a registry of its own. Values are let through by type, as in `run.log`: names are plain text, values plain
numbers. The time that a site takes for a contribution is not exported, nor anything it could be read from: with
unit = "client" it tells whether the site had data in a round.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dp_federated_lora.errors import ConfigError, SecureSumAborted

_SECONDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_REFUSED_BY_COORDINATOR: Final = ("answer", "order", "run", "sum")
_STEPS: Final = ("answered", "refused")
_RUNS: Final = ("joined", "refused")
_PURPOSES: Final = ("training", "evaluation")


class _Metrics:
    """What both programs have; `registry` holds it all.

    Args:
        program: of which the names of metrics tell.
    """

    def __init__(self, program: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix = f"dpfl_{program}"
        self._bytes = self._counter("bytes", "Bytes of messages to and from the other side, by direction.", "direction")
        _start_at_zero(self._bytes, ("sent", "received"))
        self._connected = self._gauge("connected", "Whether the broker is connected: 1 or 0.")
        self._expires = self._gauge("certificate_expires", "When this member's certificate ends, Unix time.")
        self._spent = self._gauge("run_epsilon_spent", "Epsilon that the run under way has charged, when last told.", "run")
        self._left = self._gauge("run_epsilon_left", "Epsilon of its budget that the run under way may still charge.", "run")

    def sent(self, size: int) -> None:
        """Count the bytes of a message that leaves."""
        self._bytes.labels("sent").inc(_number(size))

    def received(self, size: int) -> None:
        """Count the bytes of a message that has come in."""
        self._bytes.labels("received").inc(_number(size))

    def connected_while(self, connected: Callable[[], bool]) -> None:
        """Ask `connected` at every look at the metrics."""
        self._connected.set_function(lambda: float(connected()))

    def expires(self, moment: datetime) -> None:
        """Tell when the member's certificate ends."""
        self._expires.set(moment.timestamp())

    def run_spent(self, run: str, epsilon: float, budget: float) -> None:
        """Tell what the run under way has charged, of how much."""
        self._spent.labels(_name(run)).set(_number(epsilon))
        self._left.labels(_name(run)).set(_number(budget) - epsilon)

    def run_over(self, run: str) -> None:
        """A run is not under way any more: what it has charged is not told any longer."""
        self._spent.remove(run)
        self._left.remove(run)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", meaning, labels, registry=self.registry)


@final
class CoordinatorMetrics(_Metrics):
    """What a coordinator tells: it knows nothing but what sites have released to it."""

    def __init__(self) -> None:
        super().__init__("coordinator")
        self._rounds = self._counter("rounds_released", "Rounds whose adapter this program has published, by run.", "run")
        self._sums = self._counter("sums", "Secure sums that were opened or aborted.", "end")
        self._lost = self._counter("sites_lost", "Sites that were in a secure sum and did not answer its next step in time.")
        self._refusals = self._counter(
            "refusals", "Answers that were refused, sums that sites refused, runs and orders that were refused.", "what"
        )
        # the time of a step is that of its slowest site, as the coordinator sees by itself
        self._steps = Histogram(
            "dpfl_coordinator_sum_step_seconds",
            "Time from asking for a step of a secure sum to the last answer or the deadline.",
            ["step"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        for counter, names in ((self._sums, ("opened", "aborted")), (self._refusals, _REFUSED_BY_COORDINATOR)):
            _start_at_zero(counter, names)

    def runs_in(self, states: Iterable[str], now: Callable[[], Iterable[str]]) -> None:
        """Count runs by state at every look at the metrics.

        Args:
            states: all that a run can be in.
            now: the state of every run.
        """
        self.registry.register(_RunStates(tuple(states), now))

    def round_released(self, run: str, epsilon: float, budget: float) -> None:
        """Count a published round of a run, and tell what it has charged, of how much."""
        self._rounds.labels(_name(run)).inc()
        self.run_spent(run, epsilon, budget)

    @contextmanager
    def sum_under_way(self) -> Iterator[None]:
        """Count a secure sum by how it ends; one that is interrupted goes on later and is not counted."""
        try:
            yield
        except SecureSumAborted:
            self._sums.labels("aborted").inc()
            raise
        self._sums.labels("opened").inc()

    @contextmanager
    def step_under_way(self, step: str) -> Iterator[None]:
        """Take the time of a step of a secure sum that comes to its end."""
        start = time.monotonic()
        yield
        self._steps.labels(_name(step)).observe(time.monotonic() - start)

    def sites_lost(self, count: int) -> None:
        """Count sites that a step of a secure sum went on without."""
        self._lost.inc(_number(count))

    def refused(self, what: str) -> None:
        """Count a refusal of an "answer", an "order", a "run" or a "sum"."""
        self._refusals.labels(_one_of(_REFUSED_BY_COORDINATOR, what)).inc()


@final
class SiteMetrics(_Metrics):
    """What a site tells: how often it took part, and what that has cost."""

    def __init__(self) -> None:
        super().__init__("site")
        self._steps = self._counter(
            "steps", "Answers to steps of secure sums and refusals of them; one asked again counts again.", "end"
        )
        self._runs = self._counter("runs", "Runs that were joined or refused.", "end")
        self._contributions = self._counter(
            "contributions", "Noisy contributions that were charged, by purpose; with data in them or without.", "purpose"
        )
        labels = ("data_set", "purpose")
        self._lifetime_spent = self._gauge("epsilon_spent", "Epsilon that all runs have charged to a data set.", *labels)
        self._lifetime_left = self._gauge("epsilon_left", "Epsilon of a data set's budget that is left for all runs.", *labels)
        _start_at_zero(self._steps, _STEPS)
        _start_at_zero(self._runs, _RUNS)
        _start_at_zero(self._contributions, _PURPOSES)

    def step(self, end: str) -> None:
        """Count a step of a secure sum that was "answered" or "refused"."""
        self._steps.labels(_one_of(_STEPS, end)).inc()

    def run(self, end: str) -> None:
        """Count a run that was "joined" or "refused"."""
        self._runs.labels(_one_of(_RUNS, end)).inc()

    def contributed(self, purpose: str) -> None:
        """Count a contribution to "training" or "evaluation"."""
        self._contributions.labels(_one_of(_PURPOSES, purpose)).inc()

    def lifetime_spent(self, data_set: str, purpose: str, epsilon: float, budget: float) -> None:
        """Tell what all runs together have charged to a data set for a purpose, of how much."""
        labels = (_name(data_set), _name(purpose))
        self._lifetime_spent.labels(*labels).set(_number(epsilon))
        self._lifetime_left.labels(*labels).set(_number(budget) - epsilon)


@contextmanager
def served(metrics: CoordinatorMetrics | SiteMetrics, port: int | None, bind: str) -> Iterator[None]:
    """Serve metrics by HTTP at /metrics for as long as the block lasts; nothing is served without a port.

    Raises:
        ConfigError: if nobody can listen there.
    """
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, bind, metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {bind}, port {port}: {error.strerror}; name a free port by --metrics-port, and an "
            "address of this machine by --metrics-bind"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@final
class _RunStates(Collector):
    def __init__(self, states: tuple[str, ...], now: Callable[[], Iterable[str]]) -> None:
        self._states, self._now = states, now

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The metric without values: no run is looked at before somebody asks."""
        return [GaugeMetricFamily("dpfl_coordinator_runs", "Runs by state.", labels=["state"])]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The metric with the states of now."""
        (family,), tally = self.describe(), Tally(self._now())
        for state in self._states:
            family.add_metric([state], tally[state])
        return [family]


def _start_at_zero(counter: Counter, names: Iterable[str]) -> None:
    """Show a counter before its first event, or its first increase is not seen as one."""
    for name in names:
        counter.labels(name)


def _number(value: float) -> float:
    # exact types: a numpy.float64 is a `float` by inheritance and comes out of an array
    if type(value) not in (int, float):
        raise TypeError(
            f"a metric must be a plain number, got a {type(value).__name__}; convert it with int() or float() where it is made "
            "and public"
        )
    return value


def _name(value: str) -> str:
    if type(value) is not str:
        raise TypeError(f"a label of a metric must be plain text, got a {type(value).__name__}; name what is public")
    return value


def _one_of(names: tuple[str, ...], value: str) -> str:
    if value not in names:
        raise ValueError(f"{value!r} is not counted here: use one of {', '.join(names)}")
    return value
