"""Train a configuration with canaries in it, and hold what they show against the epsilon it claims."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from dp_federated_lora.audit import CanaryAudit, Verdict, judge
from dp_federated_lora.errors import AuditError, RunInterrupted
from dp_federated_lora.files import write_durably
from dp_federated_lora.lab.config import Config, load_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import OnPhase, OnRound, Run
from dp_federated_lora.privacy import SecureRandom

CANARIES: Final = 1000


@final
@dataclass(frozen=True, slots=True)
class AuditResult:
    """The audited run's directory and what was found."""

    path: Path
    verdict: Verdict


def audited_config(target: Path) -> Config:
    """The configuration in a file or of a run directory."""
    return load_config(RunDirectory.existing(target).config if target.is_dir() else target)


def audit_directory(target: Path) -> Path:
    """Where the audit of a configuration file or run directory goes unless said otherwise."""
    return Path("runs") / f"audit-{target.resolve().name if target.is_dir() else target.stem}"


def audit(
    config: Config,
    *,
    out: str | Path,
    canaries: int = CANARIES,
    confidence: float = 0.95,
    on_round: OnRound | None = None,
    on_phase: OnPhase | None = None,
) -> AuditResult:
    """Train `config` with canaries in a new run directory, and write `audit.json` there.

    The canaries cost utility: the adapter of an audited run is not for use. Their coins come from the operating system, or
    from `[run] insecure_seed` where it is set.

    Args:
        config: what to audit.
        out: the new run directory.
        canaries: number of canaries; half of them take part.
        confidence: of the lower bound.
        on_round: as `train`.
        on_phase: as `train`.

    Raises:
        AuditError: if confidence or number of canaries are impossible; nothing was trained.
        RunError: if the directory exists.
        RunInterrupted: on SIGINT or SIGTERM; an audit cannot be resumed.
    """
    if not 0 < confidence < 1:
        raise AuditError(f"a confidence lies in (0, 1), got {confidence}")
    seed = config.run.insecure_seed
    rng = SecureRandom.from_os() if seed is None else SecureRandom.insecure_from(seed).derive("audit")
    inserted = CanaryAudit(canaries, rng)
    with RunDirectory.create(Path(out), config) as directory:
        run = Run(directory, on_round=on_round, on_phase=on_phase, instrument=inserted.wrap)
        try:
            run.train()
        except RunInterrupted as error:
            raise RunInterrupted(f"the audit in {out} was stopped and cannot be resumed: start it again elsewhere") from error
        plan = privacy_plan(config)
        verdict = judge(inserted, plan, claimed=plan.claimed(run.spent()), confidence=confidence)
        write_durably(directory.audit, (json.dumps(verdict.as_json(), indent=2, allow_nan=False) + "\n").encode())
        run.write_results()
    return AuditResult(directory.path, verdict)
