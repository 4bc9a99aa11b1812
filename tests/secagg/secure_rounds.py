"""A secure sum in memory, for tests: who drops out when, and what a dishonest server changes on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dp_federated_lora.secagg.client_session import STAGES, ClientSession
from dp_federated_lora.secagg.server_session import ServerSession
from dp_federated_lora.secagg.terms import Terms
from dp_federated_lora.signing import SigningKey

KEYS = {f"site-{number:03}": SigningKey(Ed25519PrivateKey.generate()) for number in range(300)}
Tamper = Callable[[str, str, bytes], bytes]


def names_of(count: int) -> list[str]:
    return list(KEYS)[:count]


def terms_of(count: int, **changes: object) -> Terms:
    roster = {name: KEYS[name].public for name in names_of(count)}
    facts = {"run": "r", "number": 1, "size": 4, "bits": 20, "roster": roster, "model": bytes(32), "min_cohort": 3}
    return Terms(**facts | changes)  # type: ignore[arg-type]


def integers_of(terms: Terms, name: str) -> np.ndarray:
    return (np.arange(1, terms.size + 1) * 7919 * (1 + int(name.removeprefix("site-")))) % (1 << terms.bits)


def clients_of(terms: Terms) -> dict[str, ClientSession]:
    return {name: ClientSession(name, terms, KEYS[name]) for name in terms.roster}


def answer(client: ClientSession, stage: str, message: bytes, name: str) -> bytes:
    arguments = {"advertise": (), "mask": (message, integers_of(client.terms, name))}.get(stage, (message,))
    return getattr(client, stage)(*arguments)


def run_until(
    last: str,
    terms: Terms,
    clients: Mapping[str, ClientSession],
    *,
    gone: Mapping[str, str] | None = None,
    tamper: Tamper = lambda stage, name, data: data,
) -> tuple[ServerSession, dict[str, bytes]]:
    """The server and its messages after the stage `last`; clients in `gone` are silent from that stage on."""
    server, messages, gone = ServerSession(terms), dict.fromkeys(clients, b""), gone or {}
    for stage in STAGES[: STAGES.index(last) + 1]:
        for name, message in messages.items():
            if name in gone and STAGES.index(gone[name]) <= STAGES.index(stage):
                continue
            server.receive(name, tamper(stage, name, answer(clients[name], stage, message, name)))
        messages = server.advance()
    return server, messages


def expected_sum(terms: Terms, names: object) -> np.ndarray:
    return sum((integers_of(terms, name) for name in names), np.zeros(terms.size, dtype=np.int64)) % (1 << terms.bits)  # type: ignore[attr-defined]
