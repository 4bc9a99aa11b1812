"""Secure sums: exact for everybody who stays, aborted for everything else, and closed to a server that lies."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, hypergeom
from secure_rounds import KEYS, answer, clients_of, expected_sum, integers_of, names_of, run_until, terms_of

from dp_federated_lora.errors import IncompatiblePlan, SecureSumAborted
from dp_federated_lora.secagg import messages as m
from dp_federated_lora.secagg.client_session import STAGES, ClientSession
from dp_federated_lora.secagg.crypto import SHARE_BYTES, PrivateKey, agree, combine, split
from dp_federated_lora.secagg.server_session import ServerSession
from dp_federated_lora.secagg.terms import Terms, circle_for, degree_for
from dp_federated_lora.signing import SigningKey

LATER = STAGES[1:]


def decoded(data: bytes, kind: type[m.Kind], terms) -> m.Kind:
    return m.decode(data, kind, context=terms.context, limit=terms.limit)


def test_the_sum_is_exact_for_every_dropout_of_five_clients_or_there_is_none():
    terms, opened = terms_of(5), 0
    for pattern in itertools.product([*LATER, None], repeat=5):
        gone = {name: stage for name, stage in zip(names_of(5), pattern, strict=True) if stage}
        staying = {stage: sum(LATER.index(at) > LATER.index(stage) for at in gone.values()) + 5 - len(gone) for stage in LATER}
        if min(staying.values()) < 3:
            with pytest.raises(SecureSumAborted):
                run_until("reveal", terms, clients_of(terms), gone=gone)
            continue
        opened += 1
        integers, names = run_until("reveal", terms, clients_of(terms), gone=gone)[0].result
        assert set(names) == {name for name in names_of(5) if gone.get(name) not in {"share", "mask"}}
        assert np.array_equal(integers, expected_sum(terms, names))
    assert opened == 181


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_sum_is_exact_with_neighbours_on_a_circle(data: st.DataObject):
    count = data.draw(st.integers(30, 300))
    bits = data.draw(st.sampled_from([1, 8, 17, 32]))
    terms = terms_of(count, degree=14, min_cohort=count // 2, bits=bits)
    gone = data.draw(st.dictionaries(st.sampled_from(names_of(count)), st.sampled_from(LATER), max_size=count // 10))
    try:
        integers, names = run_until("reveal", terms, clients_of(terms), gone=gone)[0].result
    except SecureSumAborted:
        assert gone  # so many of one neighbourhood that its secrets stay closed
        return
    assert np.array_equal(integers, expected_sum(terms, names))


def test_sessions_may_be_stored_between_any_two_messages():
    terms = terms_of(4)
    server, clients, messages = ServerSession(terms), clients_of(terms), dict.fromkeys(names_of(4), b"")
    for stage in STAGES:
        for name, message in messages.items():
            clients[name] = ClientSession.from_bytes(clients[name].to_bytes(), terms, KEYS[name])
            server.receive(name, answer(clients[name], stage, message, name))
        messages = server.advance()
    assert np.array_equal(server.result.integers, expected_sum(terms, names_of(4)))
    with pytest.raises(SecureSumAborted, match="damaged"):
        ClientSession.from_bytes(b"\x93", terms, KEYS["site-000"])
    with pytest.raises(SecureSumAborted, match="roster"):
        ClientSession.from_bytes(clients["site-001"].to_bytes(), terms, KEYS["site-000"])


def test_one_masked_vector_is_uniform():
    """Chi-square over 256 values of 2^18 integers; a sound build fails with probability 1e-7."""
    terms = terms_of(3, size=2**18, bits=8)
    seen = []
    run_until("mask", terms, clients_of(terms), tamper=lambda stage, name, data: seen.append((stage, name, data)) or data)
    (data,) = (data for stage, name, data in seen if (stage, name) == ("mask", "site-000"))
    counts = np.bincount(terms.unpack(decoded(data, m.Masked, terms).integers), minlength=256)
    expected = terms.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-7, 255)


# Attacks of a server (the numbers are those of the list in docs/secure-aggregation.md)


def test_1_a_client_reveals_once_and_one_kind_of_share_of_each_neighbour():
    terms = terms_of(5)
    clients = clients_of(terms)
    _, messages = run_until("consent", terms, clients, gone={"site-004": "mask"})
    revealed = decoded(clients["site-000"].reveal(messages["site-000"]), m.Revealed, terms)
    assert set(revealed.seeds) == set(names_of(4))
    assert set(revealed.keys) == {"site-004"}
    with pytest.raises(SecureSumAborted, match="once, in order"):
        clients["site-000"].reveal(messages["site-000"])


def test_2_different_survivors_for_different_clients_open_nothing():
    terms = terms_of(6)
    clients = clients_of(terms)
    _, messages = run_until("mask", terms, clients)
    truth = decoded(messages["site-000"], m.Survivors, terms)
    lie = m.encode(m.Survivors(m.VERSION, terms.context, truth.names[:-1]))
    tags = {}
    for number, name in enumerate(names_of(5)):
        told = lie if number < 3 else messages[name]
        tags[name] = decoded(clients[name].consent(told), m.Consent, terms).tags
    mixed = m.encode(m.Consents(m.VERSION, terms.context, {n: t["site-000"] for n, t in tags.items() if n != "site-000"}))
    with pytest.raises(SecureSumAborted, match="was told other survivors"):
        clients["site-000"].reveal(mixed)
    few = m.encode(m.Consents(m.VERSION, terms.context, {n: tags[n]["site-001"] for n in ("site-000", "site-002")}))
    with pytest.raises(SecureSumAborted, match="too few"):
        clients["site-001"].reveal(few)


@pytest.mark.parametrize("corrupt", [0, 1, 2])
def test_2_no_division_of_honest_clients_opens_both_secrets_of_one(corrupt: int):
    """Corrupt clients consent to everything and hand over all shares that they hold; the victim is the last client."""
    count, victim = 7, "site-006"
    terms = terms_of(count, corrupt=corrupt, min_cohort=4)
    threshold, liars = terms.threshold(count), names_of(corrupt)
    honest = [name for name in names_of(count - 1) if name not in liars]
    for size in range(len(honest) + 1):
        clients = clients_of(terms)
        _, messages = run_until("mask", terms, clients)
        everybody = decoded(messages[victim], m.Survivors, terms).names
        lists = {True: everybody, False: everybody[:-1]}
        told = {name: name in honest[:size] for name in [*honest, *liars]} | {victim: True}
        both_told = {name: clients[name].to_bytes() for name in liars}
        tags = {side: {} for side in lists}
        for name in [*honest, victim]:
            content = m.encode(m.Survivors(m.VERSION, terms.context, lists[told[name]]))
            tags[told[name]][name] = decoded(clients[name].consent(content), m.Consent, terms).tags
        for side, names in lists.items():
            for name in liars:
                liar = ClientSession.from_bytes(both_told[name], terms, KEYS[name])
                content = m.encode(m.Survivors(m.VERSION, terms.context, names))
                tags[side][name] = decoded(liar.consent(content), m.Consent, terms).tags
        seeds = keys = len(liars)
        for name in [*honest, victim]:
            mine = {other: t[name] for other, t in tags[told[name]].items() if name in t and other in lists[told[name]]}
            try:
                data = clients[name].reveal(m.encode(m.Consents(m.VERSION, terms.context, mine)))
            except SecureSumAborted:
                continue
            revealed = decoded(data, m.Revealed, terms)
            seeds, keys = seeds + (victim in revealed.seeds), keys + (victim in revealed.keys)
        assert seeds < threshold or keys < threshold


def changed_cohort(terms, data: bytes, change) -> bytes:
    cohort = decoded(data, m.Cohort, terms)
    return m.encode(msgspec.structs.replace(cohort, **change(cohort)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: {"neighbours": (msgspec.structs.replace(c.neighbours[0], masking=bytes(31) + b"\1"), *c.neighbours[1:])},
            "signed",
        ),
        (
            lambda c: {
                "neighbours": (msgspec.structs.replace(c.neighbours[0], masking=c.neighbours[1].masking), *c.neighbours[1:])
            },
            "twice",
        ),
        (lambda c: {"neighbours": (msgspec.structs.replace(c.neighbours[0], name="site-009"), *c.neighbours[1:])}, "neighbours"),
        (lambda c: {"neighbours": c.neighbours[1:]}, "neighbours"),
        (lambda c: {"neighbours": (*c.neighbours, c.neighbours[0])}, "neighbours"),
        (lambda c: {"names": (*c.names, "stranger")}, "roster"),
        (lambda c: {"names": c.names[1:]}, "whom it is sent to"),
        (lambda c: {"names": (*c.names, c.names[-1])}, "once"),
        (lambda c: {"names": c.names[:2], "neighbours": c.neighbours[:1]}, "fewest"),
    ],
)
def test_3_and_5_replaced_repeated_and_missing_keys_strangers_and_tiny_cohorts_are_refused(change, message: str):
    terms = terms_of(5)
    clients = clients_of(terms)
    _, messages = run_until("advertise", terms, clients)
    with pytest.raises(SecureSumAborted, match=message):
        clients["site-000"].share(changed_cohort(terms, messages["site-000"], change))
    with pytest.raises(SecureSumAborted, match="the round is over"):
        clients["site-000"].share(messages["site-000"])


@pytest.mark.parametrize(
    "change", [{"number": 2}, {"run": "other"}, {"model": bytes(31) + b"\1"}, {"bits": 21}, {"min_cohort": 2}]
)
def test_4_clients_of_another_round_or_model_are_refused_even_where_the_server_forges_the_context(change: dict):
    terms, other = terms_of(5), terms_of(5, **change)
    clients, odd = clients_of(terms), ClientSession("site-000", other, KEYS["site-000"])
    _, messages = run_until("advertise", terms, clients)
    odd.advertise()
    with pytest.raises(SecureSumAborted, match="another round"):
        odd.share(messages["site-000"])
    odd = ClientSession("site-000", other, KEYS["site-000"])
    odd.advertise()
    forged = msgspec.structs.replace(decoded(messages["site-000"], m.Cohort, terms), context=other.context)
    forged = msgspec.structs.replace(
        forged, neighbours=tuple(msgspec.structs.replace(n, context=other.context) for n in forged.neighbours)
    )
    with pytest.raises(SecureSumAborted, match="not signed by it for this round"):
        odd.share(m.encode(forged))


def test_4_masks_of_clients_with_different_models_do_not_cancel():
    one, two = terms_of(3), terms_of(3, model=bytes(31) + b"\1")
    private, public = PrivateKey.generate(), bytes(31) + b"\7"
    total = np.zeros(4, dtype=np.uint32)
    one.add_common_mask(total, private, public, adds=True)
    two.add_common_mask(total, private, public, adds=False)
    assert total.all()


def test_3_a_key_with_which_everybody_agrees_on_zero_is_refused():
    with pytest.raises(SecureSumAborted, match="degenerate"):
        agree(PrivateKey.generate(), bytes(32), "secure sum mask", bytes(32))


def test_5_too_few_survivors_are_never_opened():
    terms = terms_of(6, min_cohort=5)
    clients = clients_of(terms)
    _, messages = run_until("mask", terms, clients)
    few = m.encode(m.Survivors(m.VERSION, terms.context, tuple(names_of(4))))
    with pytest.raises(SecureSumAborted, match="fewest that hide"):
        clients["site-000"].consent(few)
    with pytest.raises(SecureSumAborted, match="fewest to go on"):
        run_until("mask", terms, clients_of(terms), gone=dict.fromkeys(names_of(2), "mask"))


@pytest.mark.parametrize("values", [[0, 0, 0, 1 << 20], [0, 0, 0, -1], [0, 0, 0], [0.5, 0, 0, 0], [np.nan, 0, 0, 0]])
def test_7_integers_out_of_range_are_refused_before_they_are_masked(values: list):
    terms = terms_of(3)
    clients = clients_of(terms)
    _, messages = run_until("share", terms, clients)
    with pytest.raises(SecureSumAborted, match="contribution is"):
        clients["site-000"].mask(messages["site-000"], np.array(values))


def test_survivors_who_are_strangers_missing_or_sent_no_shares_are_refused():
    terms = terms_of(5)
    for names, message in (
        (("site-000", "site-001", "site-009"), "of the cohort"),
        (("site-001", "site-002", "site-003"), "whom they are sent to"),
        (("site-000", "site-000", "site-001", "site-002"), "once each"),
        (tuple(names_of(5)), "sent no shares"),
    ):
        clients = clients_of(terms)
        run_until("mask", terms, clients, gone={"site-004": "share"})
        with pytest.raises(SecureSumAborted, match=message):
            clients["site-000"].consent(m.encode(m.Survivors(m.VERSION, terms.context, names)))


def test_sealed_shares_that_were_changed_or_meant_for_another_do_not_open():
    terms = terms_of(4)
    for change in (
        lambda sealed: sealed | {"site-001": sealed["site-002"]},
        lambda sealed: sealed | {"site-001": sealed["site-001"][:-1] + bytes([sealed["site-001"][-1] ^ 1])},
    ):
        clients = clients_of(terms)
        _, messages = run_until("share", terms, clients)
        delivered = decoded(messages["site-000"], m.Delivered, terms)
        with pytest.raises(SecureSumAborted, match="does not open"):
            data = m.encode(msgspec.structs.replace(delivered, sealed=change(delivered.sealed)))
            clients["site-000"].mask(data, integers_of(terms, "site-000"))


# What a client may do to the server


@pytest.mark.parametrize("wrong", ["seeds", "keys"])
def test_a_wrong_share_ends_the_round_and_never_gives_a_wrong_sum(wrong: str):
    terms = terms_of(5)

    def lie(stage: str, name: str, data: bytes) -> bytes:
        if (stage, name) != ("reveal", "site-000"):
            return data
        revealed = decoded(data, m.Revealed, terms)
        return m.encode(msgspec.structs.replace(revealed, **{wrong: dict.fromkeys(getattr(revealed, wrong), bytes(SHARE_BYTES))}))

    with pytest.raises(SecureSumAborted, match="wrong one"):
        run_until("reveal", terms, clients_of(terms), gone={"site-004": "mask"}, tamper=lie)


def test_the_server_refuses_what_is_not_due_and_goes_on():
    terms = terms_of(4)
    clients, server = clients_of(terms), ServerSession(terms)
    first = clients["site-000"].advertise()
    for sender, data, message in (
        ("stranger", first, "nothing is due"),
        ("site-001", first, "advertised keys as"),
        ("site-000", m.encode(m.Masked(m.VERSION, terms.context, b"")), "not a Advertised"),
        ("site-000", bytes(terms.limit + 1), "are the most"),
    ):
        with pytest.raises(SecureSumAborted, match=message):
            server.receive(sender, data)
    server.receive("site-000", first)
    with pytest.raises(SecureSumAborted, match="nothing is due"):
        server.receive("site-000", first)
    assert server.waiting_for() == {"site-001", "site-002", "site-003"}
    with pytest.raises(SecureSumAborted, match="1 clients answered"):
        server.advance()
    for name in names_of(4)[1:]:
        server.receive(name, clients[name].advertise())
    messages = server.advance()
    shares = clients["site-000"].share(messages["site-000"])
    fewer = decoded(shares, m.Shares, terms)
    fewer = msgspec.structs.replace(fewer, sealed={"site-001": fewer.sealed["site-001"]})
    with pytest.raises(SecureSumAborted, match="others than its neighbours"):
        server.receive("site-000", m.encode(fewer))
    server.receive("site-000", shares)
    for name in names_of(4)[1:]:
        server.receive(name, clients[name].share(messages[name]))
    messages = server.advance()
    with pytest.raises(SecureSumAborted, match="bytes where 4 integers"):
        server.receive("site-000", m.encode(m.Masked(m.VERSION, terms.context, bytes(11))))
    for stage in ("mask", "consent", "reveal"):
        for name, message in messages.items():
            server.receive(name, answer(clients[name], stage, message, name))
        messages = server.advance()
    assert np.array_equal(server.result.integers, expected_sum(terms, names_of(4)))
    with pytest.raises(SecureSumAborted, match="opened once"):
        server.advance()


KINDS = [m.Advertised, m.Cohort, m.Shares, m.Delivered, m.Masked, m.Survivors, m.Consent, m.Consents, m.Revealed]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_an_error_by_name(data: bytes, kind: type[m.Message]):
    with pytest.raises(SecureSumAborted):
        m.decode(data, kind, context=bytes(32), limit=300)


VALID = []
run_until("reveal", terms_of(3), clients_of(terms_of(3)), tamper=lambda stage, name, data: VALID.append((stage, data)) or data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VALID), st.data())
def test_damaged_messages_are_refused_or_read_as_some_other_message(valid: tuple[str, bytes], data: st.DataObject):
    stage, message = valid
    place = data.draw(st.integers(0, len(message) - 1))
    damaged = message[:place] + data.draw(st.binary(max_size=3)) + message[place + data.draw(st.integers(0, 3)) :]
    kind = dict(zip(STAGES, (m.Advertised, m.Shares, m.Masked, m.Consent, m.Revealed), strict=True))[stage]
    try:
        found = m.decode(damaged, kind, context=terms_of(3).context, limit=terms_of(3).limit)
    except SecureSumAborted:
        return
    assert type(found) is kind


# Parts


@settings(max_examples=60)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 5), st.randoms())
def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not(secret: bytes, threshold: int, more: int, random):
    shares = split(secret, range(1, threshold + more + 1), threshold)
    chosen = random.sample(sorted(shares), threshold)
    assert combine({place: shares[place] for place in chosen}) == secret
    if threshold > 1:
        assert combine({place: shares[place] for place in chosen[1:]}) != secret


@pytest.mark.parametrize(
    ("clients", "found"),
    [
        (100, [(12, 6), (22, 11), (42, 21), (42, 32)]),
        (1000, [(34, 18), (52, 28), (112, 58), (114, 78)]),
        (10_000, [(38, 21), (60, 32), (134, 70), (140, 95)]),
    ],
)
def test_degrees_and_thresholds_are_those_of_the_reference_table(clients: int, found: list[tuple[int, int]]):
    shares = [(0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (0.33, 0.1)]
    assert [degree_for(clients, corrupt=bad, dropped=gone) for bad, gone in shares] == found
    with pytest.raises(IncompatiblePlan, match="everybody"):
        degree_for(10, corrupt=0.5, dropped=0.5)


@pytest.mark.parametrize("count", [2, 5, 9, 40])
def test_neighbours_are_mutual_and_as_many_as_agreed(count: int):
    terms = terms_of(count, degree=6, min_cohort=2)
    near = {name: set(terms.neighbours(name, names_of(count))) for name in names_of(count)}
    assert all(name in near[other] for name, others in near.items() for other in others)
    assert {len(others) for others in near.values()} == {min(6, count - 1)}
    assert all(name not in others for name, others in near.items())
    other = replace(terms, number=2)
    assert count <= 9 or any(set(other.neighbours(name, names_of(count))) != near[name] for name in near)


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 16, 23, 32])
def test_integers_travel_in_as_few_bytes_as_they_need(bits: int):
    terms = terms_of(3, bits=bits, size=50)
    integers = (np.arange(50, dtype=np.uint64) * 2654435761 % (1 << bits)).astype(np.uint32)
    packed = terms.pack(integers)
    assert len(packed) == 50 * -(-bits // 8)
    assert np.array_equal(terms.unpack(packed), integers)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"bits": 33}, {"bits": 0}, {"model": b""}, {"min_cohort": 1}, {"min_cohort": 6}, {"corrupt": 2}, {"degree": 3}],
)
def test_terms_that_hide_nobody_or_make_no_sense_are_refused(change: dict):
    with pytest.raises(IncompatiblePlan):
        terms_of(5, **change)


def test_a_client_needs_its_own_key_of_the_roster():
    with pytest.raises(SecureSumAborted, match="roster"):
        ClientSession("site-000", terms_of(3), SigningKey(Ed25519PrivateKey.generate()))


@pytest.mark.parametrize(("clients", "corrupt", "dropped"), [(300, 15, 30), (1000, 50, 50), (1000, 100, 100)])
def test_a_circle_for_malicious_servers_keeps_all_three_probabilities_small(clients: int, corrupt: int, dropped: int):
    degree, bad = circle_for(clients, corrupt=corrupt, dropped=dropped)
    assert degree is not None
    assert degree % 2 == 0
    assert degree < clients - 1
    others = clients - 1
    threshold = (degree + 1 + bad) // 2 + 1
    near_bad = sum(hypergeom.pmf(k, others, corrupt, degree) for k in range(bad, degree + 1))
    alone = hypergeom.pmf(degree, others, corrupt + dropped, degree)
    stuck = sum(hypergeom.pmf(k, others, others - dropped, degree) for k in range(threshold - 1))
    assert clients * near_bad < 2**-40
    assert clients * alone < 2**-40
    assert clients * stuck < 2**-30
    assert 2 * threshold > degree + 1 + bad  # two sets that open secrets have an honest client in common
    roster = {f"c{n}": "00" for n in range(clients)}
    terms = Terms("r", 1, 8, 20, roster, bytes(32), min_cohort=clients - dropped, corrupt=bad, degree=degree)
    assert terms.threshold(degree + 1) == threshold


def test_where_no_circle_does_everybody_is_a_neighbour():
    assert circle_for(110, corrupt=40, dropped=40) == (None, 40)
