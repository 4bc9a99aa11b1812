"""Charges, permits and chains, on both kinds of database."""

import copy
import hashlib
import json
import pickle
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from databases import Place
from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    LedgerCorrupt,
    LedgerKeyLost,
    LedgerLocked,
    PermitMismatch,
    PermitSpent,
    PrivacyError,
    RoundAlreadyReleased,
    StorageError,
)
from dp_federated_lora.privacy import (
    BoundedSum,
    Budget,
    Composition,
    GaussianMechanism,
    Ledger,
    Permit,
    PoissonSampler,
    RenyiFilter,
    Scope,
    SecureRandom,
)
from dp_federated_lora.signing import SigningKey, signature_holds
from dp_federated_lora.storage import Storage

BUDGET = Budget(3.0, 1e-5)
MECHANISM = GaussianMechanism(2.0)
EVENT = PoissonSampler(0.2).amplify(MECHANISM.event)


def opened(place: Place, **options: object) -> Ledger:
    return Ledger.open(place.where, **({"budget": BUDGET, "owner": "tests", "key": place.key} | options))  # type: ignore[arg-type]


def participants(place: Place, *names: str, **options: object) -> tuple[Ledger, ...]:
    options = {"budget": BUDGET, "scope": Scope.LIFETIME, "unit": "example", "key": place.key} | options
    return Ledger.open_all(place.where, names, **options)  # type: ignore[arg-type]


def key(number: int = 0) -> SecureRandom:
    return SecureRandom.insecure_from(number)


def charge(ledger: Ledger, number: int, stream: SecureRandom | None = None) -> Permit:
    return ledger.reserve(EVENT, round=number, purpose="training", commitment=(stream or key(number)).commitment)


def charge_all(ledgers: tuple[Ledger, ...], number: int, stream: SecureRandom | None = None, purpose: str = "run 1") -> None:
    commitment = (stream or key(number)).commitment
    Ledger.charge_all(ledgers, EVENT, round=number, purpose=purpose, commitment=commitment)


@pytest.fixture
def file(tmp_path: Path) -> Place:
    """A place that is a file."""
    return Place(str(tmp_path / "ledger.sqlite"), tmp_path / "ledger.key")


def test_spend_is_the_composition_of_the_charged_events_and_survives_reopening(place: Place):
    ledger = opened(place)
    assert ledger.spent().epsilon == 0.0
    for number in (1, 2, 3):
        charge(ledger, number)
    expected = Composition()
    expected.add(EVENT, 3)
    assert ledger.spent().epsilon == pytest.approx(expected.epsilon(1e-5), rel=1e-6)
    assert opened(place).spent() == ledger.spent() == Ledger.read(place.where).spent()
    assert ledger.spent().charges == 3


def in_another_process(place: Place, code: str, *arguments: object) -> str:
    """What code prints that has this module as `t` and the place as `place`; it may fork as it likes."""
    start = (
        "import os, sys; sys.path[:0] = sys.argv[1:3]; import test_ledger as t\n"
        "place = t.Place(sys.argv[3], t.Path(sys.argv[4]))\n"
        "def wait(): return os.waitstatus_to_exitcode(os.wait()[1])\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", start + code, here, here.parent, place.where, place.key, *arguments]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


DEATHS = """
if not os.fork():
    t.charge(t.opened(place), 1); os._exit(9)
assert wait() == 9
if not os.fork():
    ledger, insert = t.opened(place), t.Storage.insert
    t.Storage.insert = lambda *a: (insert(*a), os._exit(9))
    t.charge(ledger, 2)
assert wait() == 9
"""


def test_a_charge_survives_a_process_that_dies_right_after_it_and_half_a_charge_does_not(place: Place):
    in_another_process(place, DEATHS)
    ledger = opened(place)
    ledger.verify()
    assert ledger.spent().charges == 1
    charge(ledger, 2)


def test_overspending_is_refused_before_anything_is_written(place: Place):
    ledger = opened(place)
    number = 0
    with pytest.raises(BudgetExhausted, match="over the budget of 3"):
        while True:
            number += 1
            charge(ledger, number)
    rows = ledger.rows()
    assert ledger.spent().epsilon <= 3.0
    assert opened(place).rows() == rows
    with pytest.raises(BudgetExhausted):
        charge(opened(place), number)


RACE = """
scope, racers = t.Scope[sys.argv[5]], int(sys.argv[6])
for racer in range(racers):
    if os.fork():
        continue
    ledgers, granted = t.participants(place, "one", "two", scope=scope, lock_timeout=200), 0
    try:
        for n in range(1, 10_000):
            t.charge_all(ledgers, n, t.key(racer * 10_000 + n)); granted += 1
    except t.BudgetExhausted:
        os.write(1, f"{granted} ".encode()); os._exit(0)
codes = [wait() for _ in range(racers)]
assert codes == [0] * racers, codes
"""


@pytest.mark.parametrize("scope", Scope)
def test_eight_racing_processes_are_granted_exactly_what_one_gets(place: Place, scope: Scope):
    total = Composition() if scope is Scope.RUN else RenyiFilter.for_budget(BUDGET.epsilon, BUDGET.delta)
    granted = 0
    while (total := total.with_event(EVENT)).epsilon(BUDGET.delta) <= BUDGET.epsilon:
        granted += 1
    assert granted > 20
    participants(place, "one", "two", scope=scope)
    shares = [int(share) for share in in_another_process(place, RACE, scope.name, 8).split()]
    assert (len(shares), sum(shares)) == (8, granted)
    for ledger in Ledger.read_all(place.where):
        ledger.verify()
        assert ledger.spent().charges == granted


def test_a_budget_its_scope_and_its_unit_are_fixed_when_the_ledger_is_made(place: Place):
    opened(place)
    with pytest.raises(BudgetMismatch, match="a budget is fixed"):
        opened(place, budget=Budget(8.0, 1e-5))
    with pytest.raises(BudgetMismatch, match="one run"):
        participants(place, "tests")
    participants(place, "anna / mail")
    with pytest.raises(BudgetMismatch, match="'unit': 'client'"):
        participants(place, "anna / mail", unit="client")


def test_every_owner_has_a_chain_and_a_budget_of_its_own(place: Place):
    first, second = opened(place), opened(place, owner="somebody else")
    charge(first, 1)
    assert (first.spent().charges, second.spent().charges) == (1, 0)
    charge(second, 1)
    assert first.head != second.head
    assert first.public_key == second.public_key
    with pytest.raises(BudgetMismatch, match="2 ledgers"):
        Ledger.read(place.where)
    assert [ledger.owner for ledger in Ledger.read_all(place.where)] == ["somebody else", "tests"]
    with pytest.raises(LedgerCorrupt, match="no ledger of nobody"):
        Ledger.read_all(place.where, ["nobody"])


def test_the_same_key_resumes_a_round_under_its_first_charge_and_another_key_pays_again(place: Place):
    first = charge(opened(place), 1)
    again = charge(opened(place), 1)
    assert (again.serial, opened(place).spent().charges) == (first.serial, 1)
    other = charge(opened(place), 1, key(77))
    assert other.serial != first.serial
    assert opened(place).spent().charges == 2


def test_a_key_of_another_round_is_refused_since_its_noise_would_repeat(place: Place):
    ledger = opened(place)
    charge(ledger, 1)
    with pytest.raises(PrivacyError, match="used before"):
        charge(ledger, 2, key(1))


def test_a_published_round_is_never_released_again(place: Place):
    ledger = opened(place)
    permit = charge(ledger, 1)
    assert ledger.pending() is not None
    ledger.commit(permit.serial)
    ledger.commit(permit.serial)  # once more changes nothing
    assert ledger.pending() is None
    assert ledger.spent().released == 1
    for stream in (key(1), key(5)):
        with pytest.raises(RoundAlreadyReleased):
            charge(ledger, 1, stream)
    with pytest.raises(PrivacyError, match="no charge"):
        ledger.commit(0)


def test_a_permit_buys_exactly_the_release_that_was_charged(file: Place):
    ledger = opened(file)
    empty = BoundedSum.collect([], size=3, clip_norm=1.0)
    permit = charge(ledger, 1)
    with pytest.raises(PermitMismatch):
        MECHANISM.release(empty, charged=GaussianMechanism(1.0).event, permit=permit, rng=key(1))
    with pytest.raises(PermitMismatch):
        MECHANISM.release(empty, charged=EVENT, permit=permit, rng=key(2))
    released = MECHANISM.release(empty, charged=EVENT, permit=permit, rng=key(1))
    assert released.insecure
    with pytest.raises(PermitSpent):
        MECHANISM.release(empty, charged=EVENT, permit=permit, rng=key(1))


def test_permits_and_signing_keys_cannot_be_forged_or_copied(file: Place):
    permit = charge(opened(file), 1)
    for attempt in (
        lambda: Permit(object(), 1, 1, EVENT, "0" * 64),
        lambda: pickle.dumps(permit),
        lambda: copy.copy(permit),
        lambda: copy.deepcopy(permit),
        lambda: pickle.dumps(SigningKey.load(file.key)),
    ):
        with pytest.raises(PrivacyError):
            attempt()


EDITS = [
    "UPDATE ledger SET body = replace(body, '2.0', '9.0') WHERE serial = 2",
    "UPDATE ledger SET body = replace(body, '3.0', '8.0') WHERE serial = 0",
    "UPDATE ledger SET round = 7 WHERE serial = 2",
    "UPDATE ledger SET kind = 'commit' WHERE serial = 2",
    "UPDATE ledger SET time = '2020-01-01' WHERE serial = 1",
    "UPDATE ledger SET previous = hash WHERE serial = 2",
    "UPDATE ledger SET hash = previous WHERE serial = 3",
    "UPDATE ledger SET signature = replace(signature, '0', '1') WHERE serial = 3",
    "UPDATE ledger SET signature = '' WHERE serial = 3",
    "DELETE FROM ledger WHERE serial = 1",
    "DELETE FROM ledger WHERE serial = 0",
    "INSERT INTO ledger SELECT owner, 9, kind, round, body, time, previous, hash, signature FROM ledger WHERE serial = 3",
    "DROP TABLE ledger",
]


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_noticed(place: Place, edit: str):
    ledger = opened(place)
    for number in (1, 2, 3):
        charge(ledger, number)
    place.execute(edit)
    with pytest.raises(LedgerCorrupt):
        Ledger.read(place.where)
    with pytest.raises(LedgerCorrupt):
        charge(ledger, 4)


def test_a_signature_in_the_middle_is_checked_when_asked_and_rows_stay_with_their_owner(place: Place):
    one, _ = participants(place, "one", "two")
    for number in (1, 2, 3):
        charge_all((one,), number)
    one.verify()
    # Every signature has a 0: its last byte is the top of a number below 2^253.
    place.execute("UPDATE ledger SET signature = replace(signature, '0', '1') WHERE serial = 1")
    (reader,) = Ledger.read_all(place.where, ["one"])  # its last signature covers the chain
    with pytest.raises(LedgerCorrupt, match="row 1 .* is not signed"):
        reader.verify()
    place.execute("DELETE FROM ledger WHERE owner = 'two'")
    place.execute("UPDATE ledger SET owner = 'two' WHERE owner = 'one'")
    with pytest.raises(LedgerCorrupt, match="edited, moved"):
        Ledger.read_all(place.where, ["two"])


def test_a_chain_that_is_hashed_anew_needs_the_key(place: Place):
    ledger = opened(place)
    charge(ledger, 1)
    cheaper = replace(ledger.rows()[1], body=ledger.rows()[1].body.replace("2.0", "9.0"))
    forged = replace(cheaper, hash=cheaper.expected_hash())
    place.execute(f"UPDATE ledger SET body = '{forged.body}', hash = '{forged.hash}' WHERE serial = 1")
    with pytest.raises(LedgerCorrupt, match="not signed by its key"):
        Ledger.read(place.where)


def test_a_ledger_made_anew_with_another_key_is_noticed_by_its_head_and_cannot_be_charged(place: Place):
    ledger = opened(place)
    charge(ledger, 1)
    seen = ledger.head
    place.execute("DELETE FROM ledger")
    other = place.key.with_name("other.key")
    opened(place, key=other)
    if not place.is_file:
        assert not Ledger.read(place.where).contains(seen)
    replacement = opened(place)
    assert not replacement.contains(seen)
    with pytest.raises(LedgerKeyLost):
        charge(replacement, 1)
    with pytest.raises(LedgerCorrupt, match="changed or vanished"):
        charge(ledger, 2)


def test_rows_cut_off_the_end_are_noticed_by_whoever_has_seen_the_head(place: Place):
    ledger = opened(place)
    charge(ledger, 1)
    charge(ledger, 2)
    place.execute("DELETE FROM ledger WHERE serial = 2")
    assert not Ledger.read(place.where).contains(ledger.head)
    with pytest.raises(LedgerCorrupt, match="changed or vanished"):
        charge(ledger, 3)


def test_an_older_copy_of_the_file_is_noticed_by_whoever_has_seen_the_head(file: Place, tmp_path: Path):
    ledger = opened(file)
    charge(ledger, 1)
    older = shutil.copy(file.where, tmp_path / "older")
    charge(ledger, 2)
    shutil.copy(older, file.where)
    assert not Ledger.read(file.where).contains(ledger.head)
    with pytest.raises(LedgerCorrupt, match="changed or vanished"):
        charge(ledger, 3)


def test_a_torn_file_never_shows_a_row_that_was_not_written(file: Place):
    ledger = opened(file)
    for number in range(1, 9):
        charge(ledger, number)
    whole, path = Path(file.where).read_bytes(), Path(file.where)
    torn = [whole[:keep] for keep in (len(whole) - 1, len(whole) - 2000, len(whole) // 2, 4096, 100, 0)]
    torn += [whole[: start + 2048] + bytes(2048) + whole[start + 4096 :] for start in range(0, len(whole), 4096)]
    noticed = 0
    for content in torn:  # cut off, or a page of which the second half was never written
        path.write_bytes(content)
        try:
            reader = Ledger.read(file.where)
            reader.verify()
            assert reader.rows() == ledger.rows()[: len(reader.rows())]
            noticed += not reader.contains(ledger.head)
        except (LedgerCorrupt, StorageError):
            noticed += 1
    assert noticed >= len(torn) - 2  # what is missing may have held no row
    path.write_bytes(whole)
    assert Ledger.read(file.where).contains(ledger.head)


def test_without_its_key_a_ledger_is_read_but_not_charged(place: Place):
    ledger = opened(place)
    permit = charge(ledger, 1)
    assert place.key.stat().st_mode & 0o777 == 0o600
    assert place.key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    kept = place.key.read_bytes()
    place.key.unlink()
    keyless = opened(place)
    keyless.verify()
    assert keyless.spent() == ledger.spent()
    for attempt in (lambda: charge(keyless, 2), lambda: keyless.commit(permit.serial), lambda: keyless.sign("statement", b"")):
        with pytest.raises(LedgerKeyLost, match="restore the key"):
            attempt()
    charge(keyless, 1)  # the charge that is there needs no signature
    with pytest.raises(LedgerKeyLost, match="restore it"):
        Ledger.open_all(place.where, ["tests", "new"], budget=BUDGET, scope=Scope.RUN, key=place.key)
    assert not place.key.exists()
    for content in (b"no key at all", b""):
        place.key.write_bytes(content)
        with pytest.raises(LedgerKeyLost, match="damaged"):
            opened(place)
    place.key.write_bytes(kept)
    charge(opened(place), 2)
    with pytest.raises(LedgerKeyLost, match="nothing was overwritten"):
        SigningKey.create(place.key)


def test_a_key_of_another_kind_is_refused(tmp_path: Path):
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "x.key"
    path.write_bytes(X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(LedgerKeyLost, match="not Ed25519"):
        SigningKey.load(path)


def test_a_signature_is_for_one_purpose_content_and_key(tmp_path: Path):
    signing, other = SigningKey.create(tmp_path / "a.key"), SigningKey.create(tmp_path / "b.key")
    signature = signing.sign("row", b"content")
    assert signature == SigningKey.load(tmp_path / "a.key").sign("row", b"content")
    assert signature_holds(signing.public, "row", b"content", signature)
    for public, purpose, content, claimed in (
        (other.public, "row", b"content", signature),
        (signing.public, "statement", b"content", signature),
        (signing.public, "row", b"contents", signature),
        (signing.public, "row", b"content", f"{int(signature[0], 16) ^ 1:x}{signature[1:]}"),
        (signing.public, "row", b"content", "not hexadecimal"),
        ("", "row", b"content", signature),
    ):
        assert not signature_holds(public, purpose, content, claimed)


def test_rows_verify_with_a_few_lines_of_somebody_elses_code(place: Place):
    """Second implementation, from the exported columns alone."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    ledger = opened(place)
    ledger.commit(charge(ledger, 1).serial)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(json.loads(ledger.rows()[0].body)["public_key"]))
    previous = "0" * 64
    for row in ledger.rows():
        text = json.dumps([row.owner, row.serial, row.kind, row.round, row.body, row.time, previous], separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        public.verify(bytes.fromhex(row.signature), b"dpfl row\0" + bytes.fromhex(previous))
    assert previous == ledger.head


def test_a_held_ledger_a_missing_one_and_a_file_that_is_none_say_so(file: Place):
    path = Path(file.where)
    opened(file)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerLocked, match="another process"):
        opened(file, lock_timeout=0.1)
    with pytest.raises(LedgerLocked):
        Ledger.read(path, lock_timeout=0.1)
    holder.close()
    with pytest.raises(LedgerCorrupt, match="no ledger at"):
        Ledger.read(path.with_name("absent.sqlite"))
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerCorrupt, match="not a ledger"):
        opened(file)


def test_a_chain_held_by_another_session_of_a_database_is_waited_for_and_others_are_not(database: Place):
    import psycopg

    ledger, other = opened(database, lock_timeout=0.1), opened(database, owner="other", lock_timeout=0.1)
    with psycopg.connect(database.where) as holder:
        holder.execute("SELECT 1 FROM ledger WHERE owner = 'tests' AND serial = 0 FOR UPDATE")
        with pytest.raises(LedgerLocked, match="another process"):
            charge(ledger, 1)
        charge(other, 1)
        assert len(Ledger.read_all(database.where)) == 2
        holder.rollback()
    charge(ledger, 1)


def test_a_charge_is_flushed_whatever_the_server_defaults_to(place: Place, monkeypatch: pytest.MonkeyPatch):
    settings: list[str] = []
    insert = Storage.insert

    def looking(self: Storage, connection: sa.Connection, rows: object) -> None:
        query = "PRAGMA synchronous" if place.is_file else "SHOW synchronous_commit"
        settings.append(str(connection.exec_driver_sql(query).scalar()))
        insert(self, connection, rows)  # type: ignore[arg-type]

    ledger = opened(place)
    if not place.is_file:
        place.execute("ALTER ROLE dpfl SET synchronous_commit = off")
    monkeypatch.setattr(Storage, "insert", looking)
    try:
        charge(ledger, 1)
    finally:
        if not place.is_file:
            place.execute("ALTER ROLE dpfl RESET synchronous_commit")
    assert settings == ["2" if place.is_file else "on"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("postgresql://me:secret@/x?host=/nowhere", "cannot be reached or written"),
        ("mysql://me:secret@host/x", "not in mysql"),
        ("://me:secret", "not a database URL"),
    ],
)
def test_a_database_that_cannot_be_had_is_named_without_its_password(where: str, message: str, tmp_path: Path):
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match=message) as caught:
        Ledger.open(where, budget=BUDGET, owner="tests", key=tmp_path / "k")
    assert "secret" not in str(caught.value)
    with pytest.raises(PrivacyError, match="signing key"):
        Ledger.open("postgresql://me:secret@/x?host=/nowhere", budget=BUDGET, owner="tests")


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match="pip install"):
        Ledger.open("postgresql://dpfl@/x", budget=BUDGET, owner="tests", key=tmp_path / "k")


def test_a_full_disk_charges_nothing_and_says_so(file: Place, monkeypatch: pytest.MonkeyPatch):
    ledger = opened(file)
    charge(ledger, 1)
    before = ledger.rows()

    def full(self: Storage, connection: sa.Connection, rows: object) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        for filler in range(100):  # a few hundred rows to need a new page
            connection.exec_driver_sql(
                "INSERT INTO ledger VALUES ('x', ?, 'x', 0, ?, '', '', '', '')", (1000 + filler, "y" * 4000)
            )

    monkeypatch.setattr(Storage, "insert", full)
    with pytest.raises(StorageError, match="nothing was charged"):
        charge(ledger, 2)
    monkeypatch.undo()
    assert ledger.rows() == before == opened(file).rows()
    charge(ledger, 2)


def test_impossible_budgets_and_commitments_are_refused(file: Place):
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PrivacyError, match="budget"):
            Budget(epsilon, delta)
    with pytest.raises(PrivacyError, match="64 hexadecimal"):
        opened(file).reserve(EVENT, round=1, purpose="training", commitment="abc")


def test_participants_are_charged_together_or_not_at_all_and_the_poorest_is_named(place: Place):
    rich, poor = participants(place, "anna / mail", "bert / mail")
    number = 0
    with pytest.raises(BudgetExhausted, match="'bert / mail' from epsilon .* for all runs on a data set"):
        while True:
            number += 1
            charge_all((poor,), number)
    charge_all((rich,), 1)
    with pytest.raises(BudgetExhausted, match="bert / mail"):
        charge_all((rich, poor), number + 1)
    assert [ledger.spent().charges for ledger in participants(place, "anna / mail", "bert / mail")] == [1, number - 1]
    charge_all((rich,), 2)


def test_a_resumed_round_is_charged_once_and_the_same_round_of_another_run_again(place: Place):
    everyone = participants(place, "anna", "bert")
    charge_all(everyone, 1)
    charge_all(participants(place, "anna", "bert"), 1)
    charge_all(participants(place, "anna", "bert", "carl"), 1)  # carl alone is due
    assert [ledger.spent().charges for ledger in Ledger.read_all(place.where)] == [1, 1, 1]
    charge_all(everyone, 1, key(9))  # another attempt
    charge_all(everyone, 1, key(10), purpose="run 2")
    assert everyone[0].spent().charges == 3
    with pytest.raises(PrivacyError, match="used before"):
        charge_all(everyone, 1, key(1), purpose="run 2")
    assert everyone[0].commitments == {key(n).commitment for n in (1, 9, 10)}


def test_a_lifetime_composes_by_the_filter_whose_order_is_in_its_first_row(place: Place):
    (ledger,) = participants(place, "anna")
    charge_all((ledger,), 1)
    order = ledger.rows()[0].facts["renyi_order"]
    expected = RenyiFilter.for_budget(BUDGET.epsilon, BUDGET.delta)
    assert order == expected.order
    assert ledger.spent().epsilon == expected.with_event(EVENT).epsilon(BUDGET.delta)
    assert opened(place).rows()[0].facts["renyi_order"] is None


def test_many_ledgers_that_others_charge_meanwhile_catch_up(place: Place):
    mine, theirs = participants(place, "a", "b", "c"), participants(place, "a", "b", "c", "d")
    charge_all(mine, 1)
    charge_all(theirs[1:], 2)
    charge_all(theirs[2:3], 3)
    charge_all(mine, 4)
    assert [ledger.spent().charges for ledger in mine] == [2, 3, 4]
    place.execute("DELETE FROM ledger WHERE owner = 'b' AND serial = 3")
    with pytest.raises(LedgerCorrupt, match="'b' .* changed or vanished"):
        charge_all(mine, 5)
    assert mine[0].spent().charges == 2


def test_owners_are_distinct_and_ledgers_of_one_transaction_were_opened_together(file: Place):
    with pytest.raises(PrivacyError, match="named twice"):
        participants(file, "a", "a")
    with pytest.raises(PrivacyError, match="opened together"):
        charge_all((participants(file, "a")[0], participants(file, "b")[0]), 1)


def test_a_ledger_of_an_earlier_format_is_refused(file: Place):
    file.execute("CREATE TABLE ledger (serial INTEGER PRIMARY KEY, kind TEXT)")
    with pytest.raises(LedgerCorrupt, match="of this version"):
        Ledger.read(file.where)
    assert not file.key.exists()
