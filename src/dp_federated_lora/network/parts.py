"""Messages of any length over a broker that carries short ones: cut into parts, put together again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Annotated, Final, final

import msgspec
from msgspec import Meta

from dp_federated_lora.errors import MessageRefused
from dp_federated_lora.network.messages import LIMIT

PART: Final = 4 * 2**20
"""Bytes of a part, at most."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    whole: Annotated[bytes, Meta(min_length=8, max_length=8)]
    number: Annotated[int, Meta(ge=0, lt=LIMIT // PART)]
    count: Annotated[int, Meta(ge=1, le=LIMIT // PART)]
    data: Annotated[bytes, Meta(max_length=PART)]


def cut(message: bytes) -> Iterator[bytes]:
    """The parts of a message, to be sent in this order."""
    whole, count = secrets.token_bytes(8), max(1, -(-len(message) // PART))
    for number in range(count):
        data = message[number * PART : (number + 1) * PART]
        yield msgspec.msgpack.encode(_Part(whole, number, count, data))


@final
class Assembly:
    """Puts the parts of one sender's messages together.

    A part that does not follow the one before begins anew or is dropped: what was lost is asked for again by whoever misses it.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def take(self, data: bytes) -> bytes | None:
        """The message that this part completes; None if there is more to come, or a part before was lost.

        Raises:
            MessageRefused: if it is no part.
        """
        try:
            part = msgspec.msgpack.decode(data, type=_Part)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise MessageRefused(f"not a part of a message: {error}") from error
        if part.number == 0:
            self._parts = []
        follows = [(part.whole, part.count)] * len(self._parts) == [(p.whole, p.count) for p in self._parts]
        if part.number != len(self._parts) or not follows:
            self._parts = []
            return None
        self._parts.append(part)
        if len(self._parts) < part.count:
            return None
        whole, self._parts = b"".join(p.data for p in self._parts), []
        return whole
