"""What administrators say to coordinators, and their side of it."""

from __future__ import annotations

import asyncio
import json
import secrets
from base64 import b64decode
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from dp_federated_lora.errors import MessageRefused, RunError
from dp_federated_lora.files import write_durably
from dp_federated_lora.network.connection import Connection, Inbox
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.parts import Assembly
from dp_federated_lora.network.subjects import inbox_of, outbox_of

PATIENCE: Final = 60
"""Seconds to wait for a coordinator's answer."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an administrator asks for; the verb is in the subject.

    Args:
        question: repeated in the answer.
        run: name of the run; empty where none is meant.
        config: TOML, to submit.
        signature: of the submission.
    """

    question: Annotated[str, Meta(max_length=64)]
    run: Annotated[str, Meta(pattern=r"^([a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?)?\Z")]
    config: Annotated[str, Meta(max_length=1 << 20)] = ""
    signature: Annotated[str, Meta(max_length=128)] = ""


def read_order(data: bytes) -> Order:
    """An order from bytes.

    Raises:
        MessageRefused: if it is none.
    """
    try:
        return msgspec.json.decode(data, type=Order)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageRefused(f"not an order: {error}; names of runs are small letters, digits and hyphens") from error


def answer_to(order: Order, *, result: Any = None, error: str = "") -> bytes:
    """A coordinator's answer as bytes."""
    return json.dumps({"question": order.question, "result": result, "error": error}).encode()


async def ask(kit: Kit, verb: str, *, run: str = "", config: str = "", signature: str = "") -> Any:
    """Ask a coordinator, and wait for its answer.

    Raises:
        BrokerFailed: if the broker refuses this administrator, or lets it not ask this.
        MessageRefused: if the name of the run cannot be one.
        RunError: if no coordinator answers, or with its reason if it refuses.
    """
    order = Order(secrets.token_hex(8), run, config, signature)
    asked = msgspec.json.encode(order)
    read_order(asked)
    troubles: list[str] = []
    async with await Connection.connect(kit, report=troubles.append, patience=PATIENCE) as connection:
        inbox, parts = await connection.subscribe(inbox_of(kit.member)), Assembly()
        for _ in range(PATIENCE):  # a coordinator that is starting hears nothing yet, and does nothing twice
            await connection.publish(outbox_of(kit.member, verb), asked)
            await connection.flush()
            if any("permissions violation" in trouble.lower() for trouble in troubles):
                raise RunError(f"{kit.member} has no right to {verb}: the broker refused it; project.toml says who has")
            if (answer := await _answer_in(inbox, parts, order)) is not None:
                break
        else:
            raise RunError(f"no coordinator answered within {PATIENCE} seconds: is one running?")
    if answer["error"]:
        raise RunError(answer["error"])
    return answer["result"]


async def _answer_in(inbox: Inbox, parts: Assembly, order: Order) -> Any:
    """The answer to an order; None if for a second nothing has come."""
    while True:
        try:
            async with asyncio.timeout(1.0):
                message = await anext(inbox)
        except TimeoutError:
            return None
        whole = parts.take(message.data)
        if whole is not None and (answer := json.loads(whole))["question"] == order.question:
            return answer


async def fetch(kit: Kit, run: str, folder: Path) -> list[str]:
    """Bring what a finished run has released from the coordinator into a new folder, which is then as a run directory.

    Returns:
        The names of the files.

    Raises:
        RunError: as `ask`, or if the folder exists.
        MessageRefused: if a coordinator names a file outside of it.
    """
    if folder.exists():
        raise RunError(f"{folder} exists and is never overwritten: name another folder")
    files: dict[str, str] = await ask(kit, "results", run=run)
    for name in files:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise MessageRefused(f"the coordinator names a file {name!r} outside of {folder}; nothing was written")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(folder / name, b64decode(content))
    return list(files)
