"""What a site is asked to join, in facts that it derives itself from the configuration that it received.

Nothing here is what the sender says about it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from dp_federated_lora.errors import ModelError
from dp_federated_lora.federated import Purpose
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.privacy import DpEvent, PrivacyPlan
from dp_federated_lora.secagg import SharedNoise
from dp_federated_lora.storage import canonical


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A run that a site is asked to join, in public facts that the site has derived itself.

    Args:
        plan: what the run releases and costs.
        method: its name, as in [method].
        model: `model_id` of the base model here.
        participants: their public number.
        opened: the fewest participants whose sum is opened; 1 where contributions arrive one by one.
        seeded: whether noise comes from a known seed.
        submitter: who asks, as authenticated by the site.
        data_set: on which of the site's data sets.
    """

    plan: PrivacyPlan
    method: str
    model: str
    participants: int
    opened: int
    seeded: bool
    submitter: str
    data_set: str

    @classmethod
    def of(cls, config: Config, *, model: str, submitter: str, data_set: str) -> Self:
        """The facts of a configuration.

        Args:
            config: as received.
            model: `model_id` of the base model that it names.
            submitter: who sent it.
            data_set: for which data set.

        Raises:
            IncompatiblePlan: if there is no such plan.
        """
        plan = privacy_plan(config)
        sums = [plan.mechanism] + ([] if plan.evaluation is None else [plan.evaluation.shares])
        return cls(
            plan=plan,
            method=config.method.name,
            model=model,
            participants=config.federation.clients,
            opened=min(each.min_cohort if isinstance(each, SharedNoise) else 1 for each in sums),
            seeded=config.run.insecure_seed is not None,
            submitter=submitter,
            data_set=data_set,
        )

    @property
    def purposes(self) -> dict[str, tuple[DpEvent, ...]]:
        """What the data are used for, each with the events of all rounds that it is charged."""
        plan, evaluation = self.plan, self.plan.evaluation
        events = {Purpose.TRAINING.value: tuple(plan.event_in(number) for number in range(1, plan.rounds + 1))}
        if evaluation is not None:
            events[Purpose.EVALUATION.value] = (evaluation.event,) * (plan.rounds // evaluation.every)
        return events


def model_id(path: Path) -> str:
    """SHA-256, hexadecimal, of what a base model is loaded from: of a file, or over names and hashes of all files of a folder.

    Args:
        path: a file or folder, as `resolve` returns it; links are followed.

    Raises:
        ModelError: if a file cannot be read, or a folder holds none.
    """
    try:
        if path.is_file():
            return _sha256(path)
        files = sorted(Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        if not files:
            raise ModelError(f"{path} holds no file of a model; check the source")
        return hashlib.sha256(canonical([[f.relative_to(path).as_posix(), _sha256(f)] for f in files]).encode()).hexdigest()
    except OSError as error:
        raise ModelError(f"the model at {path} cannot be read: {error}; fix its permissions or fetch it again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
