"""A server's request, and a participant's report, as bytes and back, checked against schema and size first."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dp_federated_lora.errors import MessageRefused
from dp_federated_lora.federated import Purpose, Request

VERSION: Final = 1
LIMIT: Final = 1 << 30
"""Most bytes of a request."""

_PARTS: Final = ("adapter", "control", "centre")
_KINDS: Final = (torch.float32, torch.float64)


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag="request"):
    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    purpose: Purpose
    round: Annotated[int, Meta(ge=0)]
    plan_id: Annotated[str, Meta(min_length=64, max_length=64)]
    clip_norm: Annotated[float, Meta(gt=0.0)]
    staleness: Annotated[int, Meta(ge=0)]
    tensors: bytes


def encode_request(request: Request) -> bytes:
    """A request as bytes."""
    tensors = {f"adapter/{name}": tensor for name, tensor in request.adapter.items()}
    tensors |= {f"control/{name}": tensor for name, tensor in request.control.items()}
    if request.centre is not None:
        tensors["centre/"] = request.centre
    packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    facts = (request.purpose, request.round, request.plan_id, request.clip_norm, request.staleness)
    return msgspec.msgpack.encode(_Message(VERSION, *facts, packed))


def encode_report(value: Tensor) -> bytes:
    """What a participant reports, `(d,)`, as bytes: float64, the least significant byte first."""
    return value.to(torch.float64).numpy().astype("<f8").tobytes()


def decode_report(data: bytes, *, size: int) -> Tensor:
    """The report `(size,)` float64 in `data`; its numbers may be any, also none.

    Raises:
        MessageRefused: if it has another length.
    """
    if len(data) != 8 * size:
        raise MessageRefused(f"a report of {len(data):,} bytes is not one of {size:,} float64 numbers")
    return torch.from_numpy(np.frombuffer(data, "<f8").astype(np.float64))


def decode_request(data: bytes, *, limit: int = LIMIT) -> Request:
    """The request in `data`; that its tensors fit the model is for the model to say.

    Raises:
        MessageRefused: if it is too large, malformed, of another version, or has tensors that no request has.
    """
    if len(data) > limit:
        raise MessageRefused(f"a request of {len(data):,} bytes where {limit:,} are the most it may have")
    try:
        message = msgspec.msgpack.decode(data, type=_Message)
        tensors = load(message.tensors)
    except (msgspec.MsgspecError, SafetensorError, UnicodeDecodeError, RecursionError) as error:
        raise MessageRefused(f"not a request of version {VERSION}: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts or tensor.dtype not in _KINDS or not bool(tensor.isfinite().all()):
            raise MessageRefused(f"tensor {name!r} is none of a request's, or not of finite floats")
        parts[part][rest] = tensor
    return Request(
        message.purpose,
        message.round,
        message.plan_id,
        parts["adapter"],
        message.clip_norm,
        message.staleness,
        parts["centre"].get(""),
        parts["control"],
    )
