import copy
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    LedgerCorrupt,
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
    SecureRandom,
)

BUDGET = Budget(3.0, 1e-5)
MECHANISM = GaussianMechanism(2.0)
EVENT = PoissonSampler(0.2).amplify(MECHANISM.event)


def opened(path: Path, **options: float) -> Ledger:
    return Ledger.open(path, budget=BUDGET, owner="tests", **options)


def key(number: int = 0) -> SecureRandom:
    return SecureRandom.insecure_from(number)


def charge(ledger: Ledger, number: int, stream: SecureRandom | None = None) -> Permit:
    return ledger.reserve(EVENT, round=number, purpose="training", commitment=(stream or key(number)).commitment)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_spend_is_the_composition_of_the_charged_events_and_survives_reopening(path: Path):
    ledger = opened(path)
    assert ledger.spent().epsilon == 0.0
    for number in (1, 2, 3):
        charge(ledger, number)
    expected = Composition()
    expected.add(EVENT, 3)
    assert ledger.spent().epsilon == pytest.approx(expected.epsilon(1e-5), rel=1e-6)
    assert opened(path).spent() == ledger.spent() == Ledger.read(path).spent()
    assert ledger.spent().charges == 3


def test_a_charge_survives_a_process_that_dies_right_after_it(path: Path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_ledger as t; from pathlib import Path\n"
        "t.charge(t.opened(Path(sys.argv[2])), 1); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(path)], check=False)
    assert done.returncode == 9
    assert opened(path).spent().charges == 1


def test_overspending_is_refused_before_anything_is_written(path: Path):
    ledger = opened(path)
    number = 0
    with pytest.raises(BudgetExhausted, match="over the budget of 3"):
        while True:
            number += 1
            charge(ledger, number)
    rows = ledger.rows()
    assert ledger.spent().epsilon <= 3.0
    assert opened(path).rows() == rows
    with pytest.raises(BudgetExhausted):
        charge(opened(path), number)


def test_racing_processes_never_overspend_together(path: Path):
    alone = opened(path.with_name("alone.sqlite"))
    with pytest.raises(BudgetExhausted):
        for number in range(1, 1000):
            charge(alone, number)
    opened(path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_ledger as t; from pathlib import Path\n"
        "ledger = t.opened(Path(sys.argv[2]), lock_timeout=60); granted = 0\n"
        "try:\n"
        "    for n in range(1, 1000):\n"
        "        t.charge(ledger, int(sys.argv[3]) * 1000 + n); granted += 1\n"
        "except t.BudgetExhausted:\n"
        "    print(granted)\n"
    )
    here = str(Path(__file__).parent)
    racers = [
        subprocess.Popen([sys.executable, "-c", code, here, str(path), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    granted = [int(racer.communicate(timeout=250)[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert sum(granted) == alone.spent().charges == opened(path).spent().charges


def test_another_budget_or_owner_cannot_reopen_a_ledger(path: Path):
    opened(path)
    with pytest.raises(BudgetMismatch, match="a budget is fixed"):
        Ledger.open(path, budget=Budget(8.0, 1e-5), owner="tests")
    with pytest.raises(BudgetMismatch):
        Ledger.open(path, budget=BUDGET, owner="somebody else")


def test_the_same_key_resumes_a_round_under_its_first_charge_and_another_key_pays_again(path: Path):
    first = charge(opened(path), 1)
    again = charge(opened(path), 1)
    assert (again.serial, opened(path).spent().charges) == (first.serial, 1)
    other = charge(opened(path), 1, key(77))
    assert other.serial != first.serial
    assert opened(path).spent().charges == 2


def test_a_key_of_another_round_is_refused_since_its_noise_would_repeat(path: Path):
    ledger = opened(path)
    charge(ledger, 1)
    with pytest.raises(PrivacyError, match="used before"):
        charge(ledger, 2, key(1))


def test_a_published_round_is_never_released_again(path: Path):
    ledger = opened(path)
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


def test_a_permit_buys_exactly_the_release_that_was_charged(path: Path):
    ledger = opened(path)
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


def test_permits_cannot_be_forged_or_copied(path: Path):
    permit = charge(opened(path), 1)
    for attempt in (
        lambda: Permit(object(), 1, 1, EVENT, "0" * 64),
        lambda: pickle.dumps(permit),
        lambda: copy.copy(permit),
        lambda: copy.deepcopy(permit),
    ):
        with pytest.raises(PrivacyError):
            attempt()


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE ledger SET body = replace(body, '2.0', '9.0') WHERE serial = 2",
        "UPDATE ledger SET body = replace(body, '3.0', '8.0') WHERE serial = 0",
        "UPDATE ledger SET round = 7 WHERE serial = 2",
        "UPDATE ledger SET kind = 'commit' WHERE serial = 2",
        "UPDATE ledger SET time = '2020-01-01' WHERE serial = 1",
        "UPDATE ledger SET previous = hash WHERE serial = 2",
        "UPDATE ledger SET hash = previous WHERE serial = 3",
        "DELETE FROM ledger WHERE serial = 1",
        "DELETE FROM ledger WHERE serial = 0",
        "INSERT INTO ledger SELECT 9, kind, round, body, time, previous, hash FROM ledger WHERE serial = 3",
        "DROP TABLE ledger",
    ],
)
def test_every_edit_is_noticed(path: Path, edit: str):
    ledger = opened(path)
    for number in (1, 2, 3):
        charge(ledger, number)
    database = sqlite3.connect(path)
    with database:
        database.execute(edit)
    database.close()
    with pytest.raises(LedgerCorrupt):
        Ledger.read(path)
    with pytest.raises(LedgerCorrupt):
        charge(ledger, 4)


def test_rows_cut_off_the_end_are_noticed_by_whoever_has_seen_the_head(path: Path):
    ledger = opened(path)
    charge(ledger, 1)
    charge(ledger, 2)
    seen = ledger.head
    database = sqlite3.connect(path)
    with database:
        database.execute("DELETE FROM ledger WHERE serial = 2")
    database.close()
    assert not Ledger.read(path).contains(seen)


def test_a_held_ledger_a_missing_one_and_a_file_that_is_none_say_so(path: Path):
    opened(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerLocked, match="another process"):
        opened(path, lock_timeout=0.1)
    with pytest.raises(LedgerLocked):
        Ledger.read(path, lock_timeout=0.1)
    holder.close()
    with pytest.raises(LedgerCorrupt, match="no ledger at"):
        Ledger.read(path.with_name("absent.sqlite"))
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerCorrupt, match="not a ledger"):
        opened(path)


def test_a_full_disk_charges_nothing_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = opened(path)
    charge(ledger, 1)
    before = ledger.rows()
    append = Ledger._append

    def full(self: Ledger, connection, *rest):
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        for filler in range(100):  # a few hundred rows to need a new page
            connection.exec_driver_sql("INSERT INTO ledger VALUES (?, 'x', 0, ?, '', '', '')", (1000 + filler, "y" * 4000))
        return append(self, connection, *rest)

    monkeypatch.setattr(Ledger, "_append", full)
    with pytest.raises(StorageError, match="nothing was charged"):
        charge(ledger, 2)
    monkeypatch.undo()
    assert ledger.rows() == before == opened(path).rows()
    charge(ledger, 2)


def test_impossible_budgets_and_commitments_are_refused(path: Path):
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PrivacyError, match="budget"):
            Budget(epsilon, delta)
    with pytest.raises(PrivacyError, match="64 hexadecimal"):
        opened(path).reserve(EVENT, round=1, purpose="training", commitment="abc")
