"""What administrators say to coordinators, and their side of it."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from dp_federated_lora.errors import MessageRefused, RunError
from dp_federated_lora.network.connection import Connection, Inbox
from dp_federated_lora.network.kit import Kit
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
        inbox = await connection.subscribe(inbox_of(kit.member))
        for _ in range(PATIENCE):  # a coordinator that is starting hears nothing yet, and does nothing twice
            await connection.publish(outbox_of(kit.member, verb), asked)
            await connection.flush()
            if any("permissions violation" in trouble.lower() for trouble in troubles):
                raise RunError(f"{kit.member} has no right to {verb}: the broker refused it; project.toml says who has")
            if (answer := await _answer_in(inbox, order)) is not None:
                break
        else:
            raise RunError(f"no coordinator answered within {PATIENCE} seconds: is one running?")
    if answer["error"]:
        raise RunError(answer["error"])
    return answer["result"]


async def _answer_in(inbox: Inbox, order: Order) -> Any:
    """The answer to an order, if it comes within a second."""
    try:
        async with asyncio.timeout(1.0):
            async for message in inbox:
                answer = json.loads(message.data)
                if answer["question"] == order.question:
                    return answer
    except TimeoutError:
        pass
    return None
