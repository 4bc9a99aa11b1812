"""Requests as bytes: what comes back is what was sent, and nothing else passes for a request."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dp_federated_lora.errors import MessageRefused
from dp_federated_lora.federated import Purpose, Request
from dp_federated_lora.runtime import decode_request, encode_request, wire

PLAN = "ab" * 32


def a_request(**changes: object) -> Request:
    facts: dict[str, object] = {
        "purpose": Purpose.TRAINING,
        "round": 3,
        "plan_id": PLAN,
        "adapter": {"a.lora_B": torch.arange(6.0).reshape(2, 3), "head.weight": torch.ones(2)},
        "clip_norm": 0.1,
    }
    return Request(**(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "request_",
    [
        a_request(),
        a_request(purpose=Purpose.EVALUATION, staleness=2),
        a_request(centre=torch.linspace(0, 1, 8, dtype=torch.float64), control={"a.lora_B": torch.zeros(2, 3)}),
    ],
)
def test_a_request_survives_the_wire_to_the_bit(request_: Request):
    data = encode_request(request_)
    back = decode_request(data)
    assert (back.purpose, back.round, back.plan_id, back.clip_norm, back.staleness) == (
        request_.purpose,
        request_.round,
        request_.plan_id,
        request_.clip_norm,
        request_.staleness,
    )
    for ours, theirs in ((request_.adapter, back.adapter), (request_.control, back.control)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert (request_.centre is None) == (back.centre is None)
    assert request_.centre is None or torch.equal(request_.centre, back.centre)
    assert encode_request(back) == data


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_refused_or_read_and_never_crash(data: bytes):
    with pytest.raises(MessageRefused):
        decode_request(data)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_damaged_request_is_refused_or_another_request(data: st.DataObject):
    sent = bytearray(encode_request(a_request()))
    place = data.draw(st.integers(0, len(sent) - 1))
    sent[place] ^= data.draw(st.integers(1, 255))
    try:
        back = decode_request(bytes(sent))
    except MessageRefused:
        return
    assert all(bool(tensor.isfinite().all()) for tensor in back.adapter.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float):
    with pytest.raises(MessageRefused, match="finite floats"):
        decode_request(encode_request(a_request(adapter={"head.weight": torch.tensor([1.0, value])})))


def test_other_tensors_kinds_versions_and_sizes_are_refused():
    def sent(tensors: dict[str, torch.Tensor], version: int = 1) -> bytes:
        return wire.msgspec.msgpack.encode(wire._Message(version, Purpose.TRAINING, 1, PLAN, 1.0, 0, save(tensors)))

    with pytest.raises(MessageRefused, match="none of a request's"):
        decode_request(sent({"optimizer/m": torch.ones(2)}))
    with pytest.raises(MessageRefused, match="none of a request's"):
        decode_request(sent({"adapter/x": torch.ones(2, dtype=torch.int64)}))
    with pytest.raises(MessageRefused, match="version 1"):
        decode_request(sent({"adapter/x": torch.ones(2)}, version=2))
    with pytest.raises(MessageRefused, match="3 are the most"):
        decode_request(sent({"adapter/x": torch.ones(2)}), limit=3)
