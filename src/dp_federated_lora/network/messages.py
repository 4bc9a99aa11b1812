"""What coordinator and sites say to each other: MessagePack, checked against schemas and limits before anything is done."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from dp_federated_lora.errors import MessageRefused

VERSION: Final = 1
LIMIT: Final = 1 << 30
"""Most bytes of a message."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
RunName = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z")]
"""A name that is a folder at every site, and nothing else."""
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=1 << 20)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What all messages carry.

    Args:
        version: of this format.
        run: which run it belongs to.
    """

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    run: RunName


class Offered(Message, frozen=True, array_like=True, tag="offered"):
    """To a site: a run to join, with nothing that the site could not check.

    Args:
        software: version of the package that the coordinator runs.
        config: the configuration, TOML.
        model: SHA-256 of the base model at the coordinator.
        submitter: who asks for the run.
        signature: the submitter's, of run and configuration.
        sites: all who are asked, in the order of participants.
    """

    software: Name
    config: Text
    model: Digest
    submitter: Name
    signature: Text
    sites: Annotated[tuple[Name, ...], Meta(max_length=100_000)]


class Joined(Message, frozen=True, array_like=True, tag="joined"):
    """From a site: it takes part."""


class Refused(Message, frozen=True, array_like=True, tag="refused"):
    """From a site: it does not take part, or no longer, and why."""

    reasons: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=1000)]


class Asked(Message, frozen=True, array_like=True, tag="asked"):
    """To a site: the next step of a secure sum; a report is a sum of one step.

    Args:
        sum_id: of the sum; a site charges each anew.
        members: of the sum, in order.
        stage: which of `STAGES`.
        request: what to contribute to, as bytes; with the first step alone.
        body: the step's message of the secure sum.
    """

    sum_id: Digest
    members: Annotated[tuple[Name, ...], Meta(max_length=100_000)]
    stage: Annotated[int, Meta(ge=0, le=4)]
    request: bytes
    body: bytes


class Answered(Message, frozen=True, array_like=True, tag="answered"):
    """From a site: its answer to that step."""

    sum_id: Digest
    stage: Annotated[int, Meta(ge=0, le=4)]
    body: bytes


class Failed(Message, frozen=True, array_like=True, tag="failed"):
    """From a site: it leaves this sum, and why; it takes part in the next."""

    sum_id: Digest
    stage: Annotated[int, Meta(ge=0, le=4)]
    reason: Text


class Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag="present"):
    """From a site: its program runs, with a run under way or without."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]


class Ended(Message, frozen=True, array_like=True, tag="ended"):
    """To a site: the run is over, and why."""

    reason: Text


ToSite = Offered | Asked | Ended
FromSite = Joined | Refused | Answered | Failed | Present

Kind = TypeVar("Kind")

_TO_SITE: Final[msgspec.msgpack.Decoder[ToSite]] = msgspec.msgpack.Decoder(ToSite)
_FROM_SITE: Final[msgspec.msgpack.Decoder[FromSite]] = msgspec.msgpack.Decoder(FromSite)


def encode(message: ToSite | FromSite) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def to_site(data: bytes) -> ToSite:
    """A message that a coordinator sent.

    Raises:
        MessageRefused: if it is too large, malformed or of another version.
    """
    return _decoded(data, _TO_SITE)


def from_site(data: bytes) -> FromSite:
    """A message that a site sent; errors are those of `to_site`."""
    return _decoded(data, _FROM_SITE)


def _decoded(data: bytes, decoder: msgspec.msgpack.Decoder[Kind]) -> Kind:
    if len(data) > LIMIT:
        raise MessageRefused(f"a message of {len(data):,} bytes where {LIMIT:,} are the most")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageRefused(f"not a message of version {VERSION}: {error}; both sides run the same software") from error
