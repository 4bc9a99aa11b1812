"""A federation on one machine for tests: sites with data of their own, and a link to them without a network."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dp_federated_lora.data import iid, read_table, resolve
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import Run, TrainResult
from dp_federated_lora.lab.workbench import participant_names
from dp_federated_lora.monitoring.log import open_log
from dp_federated_lora.monitoring.prometheus import CoordinatorMetrics, SiteMetrics
from dp_federated_lora.network.exchange import SiteExchange
from dp_federated_lora.network.messages import VERSION, Asked, Offered, encode, to_site
from dp_federated_lora.network.offer import model_id
from dp_federated_lora.network.policy import SitePolicy
from dp_federated_lora.network.site_run import SiteFacts, SiteRun, software
from dp_federated_lora.signing import SigningKey

RUN = "run-1"
Raw = dict[str, dict[str, object]]


def networked(raw: Raw, *, rounds: int = 3, trust: str = "distributed", **run: object) -> Config:
    """A configuration for five sites, whose noise a test can repeat."""
    raw["federation"] = {"clients": 5, "partition": "iid"}
    raw["privacy"] |= {"trust": trust, "rounds": rounds}
    if trust == "distributed":
        raw["secure_sum"] = {"colluders": 0, "dropouts": 0.2}
    raw["run"] |= {"insecure_seed": 7, "threads": 1} | run
    return parse_config(raw, where="test")


def a_policy(config: Config, **plan: object) -> SitePolicy:
    """One that lets `config` pass, with rules of [plan] changed."""
    summed = config.privacy.trust == "distributed"
    rules: dict[str, object] = {
        "max_epsilon": 8.0,
        "max_delta": 1e-5,
        "min_noise_multiplier": 0.1,
        "min_participants": 3,
        "min_opened": 2 if summed else 1,
        "units": ["example", "client"],
        "trusts": [config.privacy.trust],
        "methods": [config.method.name],
        "models": [model_id(resolve(config.model.source))],
        "secure_aggregation": summed,
        "allow_insecure_seed": True,
    }
    return SitePolicy.model_validate(
        {
            "data_set": [{"name": "texts", "purposes": ["training", "evaluation"], "epsilon": 100.0, "delta": 1e-5}],
            "plan": rules | plan,
            "people": {"submit": ["alice"]},
        }
    )


def tables_of_sites(config: Config, folder: Path) -> dict[str, Path]:
    """The parts of the training table that a simulator with an iid partition would give participants, as files of their own."""
    table = read_table(resolve(config.data.train))
    parts = iid(len(table), config.federation.clients, config.run.seed)
    files = {}
    for name, part in zip(participant_names(config), parts, strict=True):
        files[name] = folder / f"{name}.csv"
        with files[name].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(list(table.columns))
            writer.writerows(zip(*([values[i] for i in part] for values in table.columns.values()), strict=True))
    return files


class Sites:
    """All sites of a run in this process."""

    def __init__(self, config: Config, folder: Path, *, policy: SitePolicy | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder = config, folder
        self.keys = {name: SigningKey(Ed25519PrivateKey.generate()) for name in participant_names(config)}
        self.roster = {name: key.public for name, key in self.keys.items()}
        self.policy = policy or a_policy(config)
        self.tables = tables_of_sites(config, folder)
        self.metrics = {name: SiteMetrics() for name in self.keys}
        self.runs = {name: self.join(name) for name in self.keys}

    def facts(self, name: str) -> SiteFacts:
        return SiteFacts(
            name=name,
            key=self.keys[name],
            roster=self.roster,
            folder=self.folder / name,
            source=str(self.tables[name]),
            data_set="texts",
            policy=self.policy,
            threads=1,
            metrics=self.metrics[name],
        )

    def offered(self, **changes: object) -> Offered:
        facts: dict[str, object] = {
            "software": software(),
            "config": self.config.to_toml(),
            "model": model_id(resolve(self.config.model.source)),
            "submitter": "alice",
            "signature": "",
            "sites": tuple(self.keys),
        }
        return Offered(version=VERSION, run=RUN, **(facts | changes))  # type: ignore[arg-type]

    def join(self, name: str) -> SiteRun:
        """A site that joins, or that comes back after its death."""
        (self.folder / name).mkdir(exist_ok=True)
        return SiteRun(self.facts(name), self.offered())


Fault = Callable[[str, Asked, list[tuple[str, bytes]]], list[tuple[str, bytes]]]
"""What the link makes of the answers to one message to a site: fewer, more, others."""


class LocalLink:
    """A link that calls the sites, with a clock of its own; `fault` may lose, repeat or change answers, and let sites die."""

    def __init__(self, sites: Sites, fault: Fault | None = None) -> None:
        self.sites, self.fault = sites, fault
        self.queue: deque[tuple[str, bytes]] = deque()
        self.now = 0.0

    def send(self, site: str, data: bytes) -> None:
        message = to_site(data)
        assert isinstance(message, Asked)
        answers = [(site, encode(self.sites.runs[site].answer(message)))]
        self.queue.extend(self.fault(site, message, answers) if self.fault else answers)

    def receive(self, timeout: float) -> tuple[str, bytes] | None:
        if self.queue:
            return self.queue.popleft()
        self.now += timeout  # nobody waits for what will not come
        return None


def exchange_of(
    config: Config,
    sites: Sites,
    link: LocalLink,
    folder: Path,
    *,
    deadline: float = 60.0,
    metrics: CoordinatorMetrics | None = None,
) -> SiteExchange:
    return SiteExchange(
        RUN,
        list(sites.keys),
        privacy_plan(config),
        roster=sites.roster,
        link=link,
        folder=folder / "sums",
        deadline=deadline,
        log=open_log(folder / "exchange.log", run=RUN),
        metrics=metrics,
        again=5.0,
        clock=lambda: link.now,
    )


def coordinate(
    config: Config,
    sites: Sites,
    link: LocalLink,
    out: Path,
    *,
    deadline: float = 60.0,
    metrics: CoordinatorMetrics | None = None,
    **run: object,
) -> TrainResult:
    """A run over the link, from its start or from where it died."""
    directory = RunDirectory.existing(out) if out.exists() else RunDirectory.create(out, config)
    with directory:
        exchange = exchange_of(config, sites, link, directory.checkpoint.parent, deadline=deadline, metrics=metrics)
        work = Run(directory, exchange=exchange, **run)  # type: ignore[arg-type]
        work.train()
        return work.write_results()


def adapter_bytes(out: Path) -> Mapping[str, bytes]:
    return {name: (out / "adapter" / name).read_bytes() for name in ("adapter_model.safetensors", "head.safetensors")}
