"""Metrics for Prometheus: what is counted, what is let through, and where it is served."""

from __future__ import annotations

import socket
import threading
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest

from dp_federated_lora.errors import ConfigError, RunInterrupted, SecureSumAborted
from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics, SiteMetrics, served
from kits import free_ports


def value(metrics: CoordinatorMetrics | SiteMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_coordinator_counts_rounds_sums_losses_and_refusals():
    metrics = CoordinatorMetrics()
    metrics.round_released("first", 0.5, 2.0)
    metrics.round_released("first", 0.75, 2.0)
    with metrics.sum_under_way(), metrics.step_under_way("mask"):
        metrics.sites_lost(2)
    for kind in (SecureSumAborted, RunInterrupted):
        with pytest.raises(kind), metrics.sum_under_way(), metrics.step_under_way("share"):
            raise kind
    metrics.refused("order")
    assert value(metrics, "dpfl_coordinator_rounds_released_total", run="first") == 2
    assert value(metrics, "dpfl_coordinator_run_epsilon_spent", run="first") == 0.75
    assert value(metrics, "dpfl_coordinator_run_epsilon_left", run="first") == 1.25
    assert value(metrics, "dpfl_coordinator_sums_total", end="opened") == 1
    assert value(metrics, "dpfl_coordinator_sums_total", end="aborted") == 1
    assert value(metrics, "dpfl_coordinator_sites_lost_total") == 2
    assert value(metrics, "dpfl_coordinator_refusals_total", what="order") == 1
    assert value(metrics, "dpfl_coordinator_refusals_total", what="run") == 0
    assert value(metrics, "dpfl_coordinator_sum_step_seconds_count", step="mask") == 1
    assert value(metrics, "dpfl_coordinator_sum_step_seconds_count", step="share") is None
    metrics.run_over("first")
    assert value(metrics, "dpfl_coordinator_run_epsilon_spent", run="first") is None
    assert value(metrics, "dpfl_coordinator_rounds_released_total", run="first") == 2


def test_runs_and_the_connection_are_looked_at_when_somebody_looks():
    metrics, states, connected = CoordinatorMetrics(), ["finished"], [True]
    metrics.runs_in(("running", "finished"), lambda: states)
    metrics.connected_while(lambda: connected[0])
    assert value(metrics, "dpfl_coordinator_runs", state="finished") == 1
    assert value(metrics, "dpfl_coordinator_runs", state="running") == 0
    assert value(metrics, "dpfl_coordinator_connected") == 1
    states.append("running")
    connected[0] = False
    assert value(metrics, "dpfl_coordinator_runs", state="running") == 1
    assert value(metrics, "dpfl_coordinator_connected") == 0


def test_a_site_tells_its_steps_runs_contributions_bytes_and_budgets_and_no_time():
    metrics, other = SiteMetrics(), SiteMetrics()
    metrics.step("answered")
    metrics.run("refused")
    metrics.contributed("training")
    metrics.sent(10)
    metrics.received(7)
    metrics.received(7)
    metrics.run_spent("first", 0.5, 2)
    metrics.lifetime_spent("texts", "training", 1.5, 20.0)
    assert value(metrics, "dpfl_site_steps_total", end="answered") == 1
    assert value(metrics, "dpfl_site_steps_total", end="refused") == 0
    assert value(metrics, "dpfl_site_runs_total", end="refused") == 1
    assert value(metrics, "dpfl_site_contributions_total", purpose="training") == 1
    assert value(metrics, "dpfl_site_bytes_total", direction="sent") == 10
    assert value(metrics, "dpfl_site_bytes_total", direction="received") == 14
    assert value(metrics, "dpfl_site_run_epsilon_left", run="first") == 1.5
    assert value(metrics, "dpfl_site_epsilon_spent", data_set="texts", purpose="training") == 1.5
    assert value(metrics, "dpfl_site_epsilon_left", data_set="texts", purpose="training") == 18.5
    assert value(other, "dpfl_site_steps_total", end="answered") == 0  # every program has its own
    assert "seconds" not in generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("secret", [torch.tensor(41.5), np.float64(41.5), np.int64(41), True, "41.5", None])
def test_anything_but_plain_numbers_and_names_is_refused_and_leaves_nothing(secret: object):
    metrics, site = CoordinatorMetrics(), SiteMetrics()
    for tell in (
        metrics.sent,
        metrics.sites_lost,
        lambda number: metrics.run_spent("first", number, 1.0),
        lambda number: site.lifetime_spent("texts", "training", 0.0, number),
    ):
        with pytest.raises(TypeError, match=f"plain number, got a {type(secret).__name__}"):
            tell(secret)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plain text, got a Tensor"):
        metrics.run_spent(torch.tensor(41.5), 0.5, 1.0)  # type: ignore[arg-type]
    for count in (metrics.refused, site.step, site.run, site.contributed):
        with pytest.raises(ValueError, match="is not counted here"):
            count("41.5")
    assert "41" not in "".join(
        line for m in (metrics, site) for line in generate_latest(m.registry).decode().splitlines() if "_created" not in line
    )


def test_metrics_are_served_as_text_and_the_port_is_free_afterwards():
    metrics, (port,) = SiteMetrics(), free_ports(1)
    for _ in range(2):
        with served(metrics, port, "127.0.0.1"), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert 'dpfl_site_steps_total{end="answered"} 0.0' in answer.read().decode()
    with served(metrics, None, "nowhere"):
        assert not any("serve_forever" in thread.name for thread in threading.enumerate())


def test_a_port_that_is_taken_and_an_address_of_nobody_are_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"127\.0\.0\.1, port {port}: Address already in use; .*--metrics-port"),
            served(SiteMetrics(), port, "127.0.0.1"),
        ):
            raise AssertionError
    with pytest.raises(ConfigError, match=r"on 192\.0\.2\.1, port \d+: Cannot assign"), served(SiteMetrics(), port, "192.0.2.1"):
        raise AssertionError
