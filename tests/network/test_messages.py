"""Messages between coordinator, sites and administrators: cut and put together again, and nothing else passes for one."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack, structs

from dp_federated_lora.errors import MessageRefused
from dp_federated_lora.network import messages as m
from dp_federated_lora.network import parts
from dp_federated_lora.network.administration import Order, answer_to, read_order
from dp_federated_lora.network.parts import Assembly, cut

ASKED = m.Asked(m.VERSION, "run-1", "ab" * 32, ("a", "b"), 0, b"request", b"")
TO_SITE = [
    ASKED,
    m.Offered(m.VERSION, "run-1", "0.2.0", "x = 1", "cd" * 32, "alice", "00" * 64, ("a", "b")),
    m.Ended(m.VERSION, "run-1", "finished"),
]
FROM_SITE = [
    m.Joined(m.VERSION, "run-1"),
    m.Refused(m.VERSION, "run-1", ("no",)),
    m.Answered(m.VERSION, "run-1", "ab" * 32, 4, b"body"),
    m.Failed(m.VERSION, "run-1", "ab" * 32, 2, "why"),
]


@pytest.mark.parametrize("message", TO_SITE, ids=lambda message: type(message).__name__)
def test_messages_to_sites_survive_and_pass_for_nothing_a_site_says(message):
    assert m.to_site(m.encode(message)) == message
    with pytest.raises(MessageRefused):
        m.from_site(m.encode(message))


@pytest.mark.parametrize("message", FROM_SITE, ids=lambda message: type(message).__name__)
def test_messages_from_sites_survive_and_pass_for_nothing_a_coordinator_says(message):
    assert m.from_site(m.encode(message)) == message
    with pytest.raises(MessageRefused):
        m.to_site(m.encode(message))


@pytest.mark.parametrize("run", ["", "../up", "a/b", "A", ".hidden", "a" * 65, "run-", "run\n", "run-1\n"])
def test_a_run_is_called_what_can_be_a_folder_and_nothing_else(run: str):
    with pytest.raises(MessageRefused):
        m.to_site(m.encode(structs.replace(ASKED, run=run)))


@pytest.mark.parametrize(
    "changes", [{"sum_id": "ab" * 31}, {"sum_id": "../" + "a" * 61}, {"stage": 5}, {"stage": -1}, {"version": 2}]
)
def test_fields_out_of_range_are_refused(changes):
    with pytest.raises(MessageRefused):
        m.to_site(m.encode(structs.replace(ASKED, **changes)))


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_refused_and_crash_nothing(data: bytes):
    for read in (m.to_site, m.from_site, read_order):
        with pytest.raises(MessageRefused):
            read(data)
    with pytest.raises(MessageRefused):
        Assembly().take(data)


def test_a_message_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(m, "LIMIT", 10)
    with pytest.raises(MessageRefused, match="10 are the most"):
        m.to_site(m.encode(ASKED))


@given(size=st.integers(0, 60), part=st.integers(1, 20))
@settings(deadline=None)
def test_messages_of_any_length_come_back_whole(size: int, part: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", part)
        message, assembly = bytes(range(size)), Assembly()
        got = [assembly.take(data) for data in cut(message)]
    assert got[-1] == message
    assert got[:-1] == [None] * (len(got) - 1)


def test_lost_parts_lose_one_message_and_no_other():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", 4)
        first, second = b"0123456789", b"abcdefghij"
        for lost in range(3):
            assembly = Assembly()
            got = [assembly.take(data) for number, data in enumerate(cut(first)) if number != lost]
            assert got == [None, None]
            assert [assembly.take(data) for data in cut(second)][-1] == second


def test_mixed_or_reordered_parts_make_no_message():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", 4)
        one, other = list(cut(b"0123456789")), list(cut(b"abcdefghij"))
        for order in itertools.permutations(range(3)):
            assembly = Assembly()
            whole = [assembly.take(one[number]) for number in order]
            assert [w for w in whole if w is not None] == ([b"0123456789"] if order == (0, 1, 2) else [])
        draw = random.Random(1)
        for _ in range(50):
            mixed = draw.sample([*one, *other], 6)
            assembly = Assembly()
            assert {assembly.take(part) for part in mixed} <= {None, b"0123456789", b"abcdefghij"}


def test_a_part_says_its_place_within_limits():
    for whole, number, count in ((b"x", 0, 1), (b"x" * 8, -1, 1), (b"x" * 8, 0, 0), (b"x" * 8, 0, 2**20)):
        with pytest.raises(MessageRefused, match="not a part"):
            Assembly().take(msgpack.encode((whole, number, count, b"")))


def test_orders_and_answers():
    order = Order("q", "run-1", "x = 1", "00")
    assert read_order(answer_free(order)) == order
    assert b'"question": "q"' in answer_to(order, result={"a": 1})
    with pytest.raises(MessageRefused, match="small letters"):
        read_order(b'{"question": "q", "run": "../up"}')


def answer_free(order: Order) -> bytes:
    from msgspec import json

    return json.encode(order)
