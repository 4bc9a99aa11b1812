"""What coordinator and sites tell Prometheus of real runs."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
import pytest
import tomli_w
from prometheus_client import generate_latest
from typer.testing import CliRunner

from dp_federated_lora.cli import main as cli
from dp_federated_lora.cli import network as network_commands
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import Config
from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics, SiteMetrics
from dp_federated_lora.network.administration import Order
from dp_federated_lora.network.coordinator import Coordinator
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.messages import VERSION, Asked, Ended, Failed, encode, to_site
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.site import Site
from dp_federated_lora.network.submissions import sign_submission
from dp_federated_lora.secagg import STAGES
from federation import RUN, LocalLink, Sites, a_policy, coordinate, networked, tables_of_sites
from kits import a_project, free_ports

Raw = dict[str, dict[str, object]]
SITES = [f"client-{number}" for number in range(5)]


def lines_of(metrics: CoordinatorMetrics | SiteMetrics) -> set[str]:
    text = generate_latest(metrics.registry).decode()
    return {line for line in text.splitlines() if not line.startswith("#")}


def value_in(metrics: CoordinatorMetrics | SiteMetrics, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in lines_of(metrics) if line.rpartition(" ")[0] == name)


def test_sums_over_a_link_are_counted_with_whom_they_lost_and_what_was_refused(raw_config: Raw, tmp_path: Path):
    def fault(site: str, message: Asked, answers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        if site == "client-2" and STAGES[message.stage] == "mask":
            answers = [(site, encode(Failed(VERSION, RUN, message.sum_id, message.stage, "no")))]
        return [(site, b"garbage"), *answers]

    config, metrics = networked(raw_config, rounds=2), CoordinatorMetrics()
    sites = Sites(config, tmp_path / "sites")
    result = coordinate(config, sites, LocalLink(sites, fault), tmp_path / "run", deadline=600.0, metrics=metrics)
    assert lines_of(metrics) >= {
        'dpfl_coordinator_sums_total{end="opened"} 2.0',
        'dpfl_coordinator_sums_total{end="aborted"} 0.0',
        "dpfl_coordinator_sites_lost_total 2.0",
        'dpfl_coordinator_refusals_total{what="sum"} 2.0',
        *(f'dpfl_coordinator_sum_step_seconds_count{{step="{step}"}} 2.0' for step in STAGES),
    }
    assert value_in(metrics, 'dpfl_coordinator_refusals_total{what="answer"}') > 0
    site = sites.metrics["client-0"]
    assert lines_of(site) >= {
        'dpfl_site_steps_total{end="refused"} 0.0',
        'dpfl_site_contributions_total{purpose="training"} 2.0',
    }
    assert value_in(site, 'dpfl_site_steps_total{end="answered"}') >= 2 * len(STAGES)  # some may have been asked again
    assert value_in(site, 'dpfl_site_run_epsilon_spent{run="run-1"}') == result.epsilon
    spent = value_in(site, 'dpfl_site_epsilon_spent{data_set="texts",purpose="training"}')
    assert value_in(site, 'dpfl_site_epsilon_left{data_set="texts",purpose="training"}') == 100.0 - spent < 100.0


class Federation:
    """A coordinator and its sites, which call each other; the end of a run ends the coordinator."""

    def __init__(self, config: Config, folder: Path, **plan: object) -> None:
        folder.mkdir()
        provision(a_project(sites=SITES), folder / "kits", with_keys=True)
        self.alice = Kit.load(folder / "kits" / "alice")
        self.coordinator = Coordinator(Kit.load(folder / "kits" / "main"), folder=folder / "main")
        self.coordinator._send = self.carry
        self.text, self.seen = config.to_toml(), set[str]()
        tables, policy = tables_of_sites(config, folder), a_policy(config, **plan)
        self.sites = {
            name: Site(
                Kit.load(folder / "kits" / name),
                source=str(tables[name]),
                data_set="texts",
                policy=policy,
                folder=folder / name,
                threads=1,
            )
            for name in SITES
        }

    def carry(self, subject: str, data: bytes) -> None:
        site = subject.split(".")[2]
        if isinstance(to_site(data), Ended):
            self.coordinator.close()
        answer = self.sites[site].handle(data)
        self.seen |= lines_of(self.coordinator.metrics)
        if answer is not None:
            self.coordinator.heard(site, answer)

    def run(self) -> None:
        signature = sign_submission(self.alice.signing, project="lungs", run="first", config=self.text)
        for verb in ("submit", "delete"):
            self.coordinator.obey("alice", verb, msgspec.json.encode(Order("1", "first", self.text, signature)))
        self.coordinator.work()
        for site in self.sites.values():
            site.close()


def test_a_whole_run_is_counted_from_its_submission_to_its_end(raw_config: Raw, tmp_path: Path):
    federation = Federation(networked(raw_config, rounds=2), tmp_path / "all")
    federation.run()
    metrics, sites = federation.coordinator.metrics, [site.metrics for site in federation.sites.values()]
    assert federation.seen >= {
        'dpfl_coordinator_runs{state="joining"} 1.0',
        'dpfl_coordinator_runs{state="running"} 1.0',
        'dpfl_coordinator_run_epsilon_spent{run="first"} 0.0',
        'dpfl_coordinator_run_epsilon_left{run="first"} 8.0',
    }
    assert lines_of(metrics) >= {
        'dpfl_coordinator_runs{state="finished"} 1.0',
        'dpfl_coordinator_runs{state="running"} 0.0',
        'dpfl_coordinator_rounds_released_total{run="first"} 2.0',
        'dpfl_coordinator_refusals_total{what="order"} 1.0',
        "dpfl_coordinator_connected 0.0",
    }
    for there, here in (("sent", "received"), ("received", "sent")):
        bytes_ = sum(value_in(site, f'dpfl_site_bytes_total{{direction="{there}"}}') for site in sites)
        assert value_in(metrics, f'dpfl_coordinator_bytes_total{{direction="{here}"}}') == bytes_ > 0
    for site in sites:
        assert 'dpfl_site_runs_total{end="joined"} 1.0' in lines_of(site)
    for each in (metrics, *sites):  # the run is over
        assert not any("run_epsilon" in line for line in lines_of(each))


def test_a_run_that_a_policy_refuses_is_counted_at_both_sides(raw_config: Raw, tmp_path: Path):
    federation = Federation(networked(raw_config, rounds=2), tmp_path / "all", max_epsilon=1.0)
    federation.run()
    lines = lines_of(federation.coordinator.metrics)
    assert {'dpfl_coordinator_refusals_total{what="run"} 1.0', 'dpfl_coordinator_runs{state="failed"} 1.0'} <= lines
    for site in federation.sites.values():
        assert 'dpfl_site_runs_total{end="refused"} 1.0' in lines_of(site.metrics)


@pytest.fixture(params=["coordinator", "site"])
def command(request: pytest.FixtureRequest, kits: Path, raw_config: Raw, tmp_path: Path) -> list[str]:
    words = [request.param, "--kit", str(kits / ("main" if request.param == "coordinator" else "a")), "--state"]
    words.append(str(tmp_path / "state"))
    if request.param == "site":
        policy = a_policy(networked(raw_config, rounds=2)).model_dump(mode="json")
        (tmp_path / "policy.toml").write_text(tomli_w.dumps(policy))
        (tmp_path / "data.csv").touch()
        words += ["--data", str(tmp_path / "data.csv"), "--data-set", "texts", "--policy", str(tmp_path / "policy.toml")]
    return words


def test_the_commands_serve_metrics_while_they_run(command: list[str], monkeypatch: pytest.MonkeyPatch):
    (port,) = free_ports(1)
    heard: list[str] = []

    def look(_serve: object) -> None:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            heard.append(answer.read().decode())

    monkeypatch.setattr(network_commands, "_until_asked", look)
    result = CliRunner().invoke(cli.app, [*command, "--metrics-port", str(port)])
    assert result.exit_code == 0
    assert f"dpfl_{command[0]}_connected 0.0" in heard[0]
    expiry = re.search(rf"^dpfl_{command[0]}_certificate_expires (\S+)", heard[0], re.MULTILINE)
    assert expiry is not None and 29 * 86400 < float(expiry[1]) - time.time() < 30 * 86400
    assert re.search(r"kit.json expires on \d{4}-\d\d-\d\d, in 29 days: ask the provisioner", result.stderr)
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20)


def test_a_certificate_that_lasts_is_not_talked_about(command: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network_commands, "_until_asked", lambda _serve: None)
    monkeypatch.setattr(network_commands, "SOON", 29)
    assert CliRunner().invoke(cli.app, command).stderr == ""


def test_the_commands_do_not_start_where_the_port_is_taken(command: list[str], tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli.app, [*command, "--metrics-port", str(port)])
    assert isinstance(result.exception, ConfigError)
    assert f"port {port}: Address already in use" in str(result.exception)
    assert not (tmp_path / "state").exists()
