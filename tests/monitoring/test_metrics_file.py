from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource

import numpy as np
import pytest
import torch

from dp_federated_lora.errors import RunError, StorageError
from dp_federated_lora.monitoring.metrics import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_what_is_appended_is_read_back_in_order(path, report):
    reports = [report(1), report(2, public_metrics={"accuracy": 0.5}), report(3)]
    for one in reports:
        MetricsFile(path).append(one)
    assert read_metrics(path) == [dataclasses.asdict(one) for one in reports]
    assert [type(one)(**fields) for one, fields in zip(reports, read_metrics(path), strict=True)] == reports


def test_a_line_is_synced_before_append_returns(path, report, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _fd: synced.append(path.read_bytes()))
    MetricsFile(path).append(report(1))
    assert synced[-1].endswith(b"}\n")


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(path, report):
    MetricsFile(path).append(report(1, update_norm=math.inf, public_metrics={"perplexity": math.nan}))
    assert json.loads(path.read_text())["public_metrics"] == {"perplexity": None}
    (read,) = read_metrics(path)
    assert math.isnan(read["update_norm"])
    assert math.isnan(read["public_metrics"]["perplexity"])


@dataclasses.dataclass(frozen=True)
class TrainingLoss:
    round: int
    loss: float


def test_only_round_reports_are_accepted(path, report):
    wider = dataclasses.make_dataclass("RoundReport", ["loss"], bases=(), frozen=True)(0.3)
    for impostor in ({"round": 1}, TrainingLoss(1, 0.3), torch.tensor(1.0), None, wider, type(report())):
        with pytest.raises(TypeError, match="only a RoundReport"):
            MetricsFile(path).append(impostor)
    assert not path.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"update_norm": torch.tensor(1.0)},
        {"noise_norm": np.float64(1.0)},
        {"epsilon": "1"},
        {"round": 1.5},
        {"bytes_per_client": True},
        {"public_metrics": {"loss": torch.tensor(0.3)}},
        {"public_metrics": {"losses": [0.3, 0.2]}},
        {"public_metrics": {3: 0.3}},
        {"public_metrics": [0.3]},
    ],
)
def test_a_report_that_carries_more_than_plain_numbers_is_refused(path, report, changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        MetricsFile(path).append(report(**changes))
    assert not path.exists()


def test_a_metric_may_be_called_like_a_field(path, report):
    MetricsFile(path).append(report(1, public_metrics={"round": 0.5, "public_metrics": 0.25}))
    assert read_metrics(path)[0]["public_metrics"] == {"round": 0.5, "public_metrics": 0.25}


def test_truncation_drops_later_rounds_and_a_torn_line_and_appending_goes_on(path, report):
    file = MetricsFile(path)
    for number in range(1, 5):
        file.append(report(number))
    with path.open("ab") as torn:
        torn.write(b'{"round": 5, "rou')
    assert [fields["round"] for fields in read_metrics(path)] == [1, 2, 3, 4]

    file.truncate_after(3)
    file.append(report(4, epsilon=9.0))
    assert [(f["round"], f["epsilon"]) for f in read_metrics(path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 9.0),
    ]
    assert list(path.parent.iterdir()) == [path]


def test_a_whole_last_line_without_its_line_break_is_kept(path, report):
    file = MetricsFile(path)
    file.append(report(1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    file.truncate_after(1)
    file.append(report(2))
    assert [fields["round"] for fields in read_metrics(path)] == [1, 2]


def test_truncating_a_file_that_was_never_written_is_nothing_to_do(path):
    MetricsFile(path).truncate_after(3)
    assert not path.exists()


def test_truncating_to_round_zero_empties_the_file(path, report):
    MetricsFile(path).append(report(1))
    MetricsFile(path).truncate_after(0)
    assert path.read_bytes() == b""
    assert read_metrics(path) == []


@pytest.mark.parametrize("damage", [b"\x00\x00\n", b"{}\n", b"7\n", b'{"round": 1\n', b"\xff\n"])
def test_damage_before_the_last_line_names_the_line_and_leaves_the_file_alone(path, report, damage):
    MetricsFile(path).append(report(1))
    path.write_bytes(path.read_bytes() + damage)
    MetricsFile(path).append(report(2))
    before = path.read_bytes()
    with pytest.raises(RunError, match="line 2 is damaged"):
        MetricsFile(path).truncate_after(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [{"round": None}, {"round": "1"}, {"public_metrics": 3}])
def test_a_line_with_fields_of_another_kind_is_damaged(path, report, change):
    MetricsFile(path).append(report(1))
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    MetricsFile(path).append(report(2))
    with pytest.raises(RunError, match="line 1"):
        read_metrics(path)


def test_a_file_that_cannot_be_read_is_a_run_error(path):
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(path)


def test_a_full_disk_is_a_storage_error_that_names_the_file(path, report):
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: the disk refused .*No space left"):
        MetricsFile(path).append(report(1))


def test_a_line_that_did_not_reach_the_disk_is_taken_back(path, report, monkeypatch):
    file = MetricsFile(path)
    file.append(report(1))
    before = path.read_bytes()

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            file.append(report(2))
    assert path.read_bytes() == before


def test_half_a_line_on_a_disk_that_ran_full_is_taken_back(path, report):
    file = MetricsFile(path)
    file.append(report(1))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))  # the kernel writes 10 bytes more
    try:
        with pytest.raises(StorageError, match="No space left"):
            file.append(report(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    file.append(report(2))
    assert [fields["round"] for fields in read_metrics(path)] == [1, 2]


def test_a_truncation_that_the_disk_refuses_keeps_the_old_file_and_leaves_no_other(path, report, monkeypatch):
    file = MetricsFile(path)
    file.append(report(1))
    file.append(report(2))
    before = path.read_bytes()

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"metrics\.jsonl"):
            file.truncate_after(1)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
