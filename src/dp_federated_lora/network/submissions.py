"""A run as an administrator submits it: signed, so that no coordinator can make one up, change one or give one another name."""

from __future__ import annotations

from collections.abc import Mapping

from dp_federated_lora.errors import PolicyRefused
from dp_federated_lora.network.kit import Administrator
from dp_federated_lora.signing import SigningKey, signature_holds
from dp_federated_lora.storage import canonical

_PURPOSE = "submit run"


def sign_submission(key: SigningKey, *, project: str, run: str, config: str) -> str:
    """An administrator's signature of a run: the project, the run's name, which no other run has, and its configuration."""
    return key.sign(_PURPOSE, _content(project, run, config))


def require_submission(
    administrators: Mapping[str, Administrator], *, submitter: str, project: str, run: str, config: str, signature: str
) -> None:
    """Check who submits a run against one's own kit.

    Raises:
        PolicyRefused: if it is nobody who may, or the signature is not of this run.
    """
    known = administrators.get(submitter)
    if known is None or known.public_key is None or "submit" not in known.rights:
        raise PolicyRefused(f"{submitter} is no administrator who may submit runs, by the kit here; renew the kit if that is new")
    if not signature_holds(known.public_key, _PURPOSE, _content(project, run, config), signature):
        raise PolicyRefused(f"run {run} is not signed by {submitter}: it was changed, or made up by a coordinator")


def _content(project: str, run: str, config: str) -> bytes:
    return canonical([project, run, config]).encode()
