"""Messages of a secure sum: MessagePack, checked against their schema and against limits of size before anything is done."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from dp_federated_lora.errors import SecureSumAborted
from dp_federated_lora.secagg.crypto import KEY_BYTES, SHARE_BYTES

VERSION: Final = 2
MAX_COHORT: Final = 100_000

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[str, Meta(min_length=128, max_length=128)]
Sealed = Annotated[bytes, Meta(min_length=28, max_length=28 + 2 * SHARE_BYTES)]
Tag = Annotated[bytes, Meta(min_length=28, max_length=28)]
Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_COHORT)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What all messages carry.

    Args:
        version: of this format.
        context: of the round; of another round, plan, roster or model it is refused.
    """

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    context: Digest


class Advertised(Message, frozen=True, array_like=True, tag="advertised"):
    """A client's public keys of the round, signed with its key of the roster."""

    name: Name
    sealing: Key
    masking: Key
    signature: Signature


class Cohort(Message, frozen=True, array_like=True, tag="cohort"):
    """To a client: everybody who takes part, in order, and what its neighbours advertised."""

    names: Names
    neighbours: Annotated[tuple[Advertised, ...], Meta(max_length=MAX_COHORT)]


class Shares(Message, frozen=True, array_like=True, tag="shares"):
    """From a client: shares of both its secrets, sealed for each neighbour, and the digest of its own seed."""

    seed_digest: Digest
    sealed: Annotated[dict[Name, Sealed], Meta(max_length=MAX_COHORT)]


class Delivered(Message, frozen=True, array_like=True, tag="delivered"):
    """To a client: what neighbours sealed for it; those who are not in it are out of the round."""

    sealed: Annotated[dict[Name, Sealed], Meta(max_length=MAX_COHORT)]


class Masked(Message, frozen=True, array_like=True, tag="masked"):
    """From a client: its masked integers modulo 2^b, little-endian, in as few bytes each as b needs."""

    integers: bytes


class Survivors(Message, frozen=True, array_like=True, tag="survivors"):
    """To all survivors: whose integers are in the sum."""

    names: Names


class Consent(Message, frozen=True, array_like=True, tag="consent"):
    """From a client: that it was told these survivors, vouched for to each of its surviving neighbours."""

    tags: Annotated[dict[Name, Tag], Meta(max_length=MAX_COHORT)]


class Consents(Message, frozen=True, array_like=True, tag="consents"):
    """To a client: what its neighbours vouched for to it."""

    tags: Annotated[dict[Name, Tag], Meta(max_length=MAX_COHORT)]


class Revealed(Message, frozen=True, array_like=True, tag="revealed"):
    """From a client: shares of survivors' seeds and of the masking keys of neighbours who dropped out; never both of one."""

    seeds: Annotated[dict[Name, Share], Meta(max_length=MAX_COHORT)]
    keys: Annotated[dict[Name, Share], Meta(max_length=MAX_COHORT)]


Kind = TypeVar("Kind", bound=Message)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[Kind], *, context: bytes, limit: int) -> Kind:
    """The message of that kind in `data`.

    Args:
        data: from the other side.
        kind: that is expected now.
        context: of the round.
        limit: most bytes it may have.

    Raises:
        SecureSumAborted: if it is too large, malformed, of another kind, version or round.
    """
    if len(data) > limit:
        raise SecureSumAborted(f"a message of {len(data):,} bytes where {limit:,} are the most a {kind.__name__} can have")
    try:
        message = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SecureSumAborted(f"not a {kind.__name__} message of version {VERSION}: {error}") from error
    if message.context != context:
        raise SecureSumAborted(f"a {kind.__name__} message of another round, plan, roster or model")
    return message
