"""The coordinator's table of runs, in SQLite and in PostgreSQL."""

from __future__ import annotations

from dataclasses import replace

import pytest

from databases import Place
from dp_federated_lora.errors import RunError
from dp_federated_lora.network.runs import RunRecord, RunTable

FIRST = RunRecord("first", "alice", "x = 1", "00", "2026-01-01T00:00:00.000+00:00")


def test_runs_are_kept_in_order_and_a_name_is_taken_once(place: Place):
    table = RunTable(place.where)
    table.add(FIRST)
    table.add(FIRST)  # the same submission again
    table.add(replace(FIRST, run="second", submitted="2026-01-02T00:00:00.000+00:00"))
    with pytest.raises(RunError, match="give this one another name"):
        table.add(replace(FIRST, signature="11"))
    table.set("first", state="failed", reason="why")
    again = RunTable(place.where)
    assert [record.run for record in again.all()] == ["first", "second"]
    assert again.get("first") == replace(FIRST, state="failed", reason="why")
    with pytest.raises(RunError, match="there is no run third"):
        again.get("third")
