from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import structlog
import torch

from dp_federated_lora.errors import StorageError
from dp_federated_lora.monitoring.log import open_log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_one_json_line_with_utc_time_level_run_and_event(tmp_path):
    log = open_log(tmp_path / "run.log", run="newswire")
    log.info("round done\nand more", round=3, epsilon=0.5, resumed=False, method=None)
    log.warning("slow")

    first, second = lines(tmp_path / "run.log")
    assert list(first)[:4] == ["timestamp", "level", "run", "event"]
    assert first["event"] == "round done\nand more"
    assert (first["run"], first["level"], second["level"]) == ("newswire", "info", "warning")
    assert (first["round"], first["epsilon"], first["resumed"], first["method"]) == (3, 0.5, False, None)
    when = datetime.fromisoformat(first["timestamp"])
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)


class Bounded:
    """A stand-in for the kernel's sealed type; its repr would give the secret away."""

    def __repr__(self):
        return "Bounded(secret=41.5)"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.tensor([41.5]), "Tensor"),
        (np.array([41.5]), "ndarray"),
        (np.float64(41.5), "float64"),
        (np.int64(41), "int64"),
        (Bounded(), "Bounded"),
        (ValueError("41.5"), "ValueError"),
        ({41.5}, "set"),
        (b"41.5", "bytes"),
    ],
)
def test_anything_but_plain_values_is_replaced_by_its_type_name(tmp_path, value, name):
    path = tmp_path / "run.log"
    log = open_log(path, run="r").bind(bound=value)
    log.error("x", direct=value, nested={"a": [1, (value, 2)]}, **{"k": {Bounded(): 1}})
    log.info(value)

    assert "41" not in "".join(json.dumps({k: v for k, v in x.items() if k != "timestamp"}) for x in lines(path))
    first, second = lines(path)
    mark = f"<redacted: {name}>"
    assert first["direct"] == first["bound"] == second["event"] == mark
    assert first["nested"] == {"a": [1, [mark, 2]]}
    assert first["k"] == {"<redacted: Bounded>": 1}


def test_a_round_report_is_logged_by_its_fields(tmp_path, report):
    open_log(tmp_path / "run.log", run="r").info("round", report=report(3, public_metrics={"accuracy": 0.9}))
    logged = lines(tmp_path / "run.log")[0]["report"]
    assert (logged["round"], logged["public_metrics"]) == (3, {"accuracy": 0.9})


def test_a_round_report_that_smuggles_a_tensor_is_redacted_as_a_whole(tmp_path, report):
    open_log(tmp_path / "run.log", run="r").info("round", report=report(update_norm=torch.tensor(41.5)))
    assert lines(tmp_path / "run.log")[0]["report"] == "<redacted: RoundReport>"


def test_numbers_that_are_not_finite_stay_readable_and_the_line_stays_json(tmp_path):
    open_log(tmp_path / "run.log", run="r").info("x", a=float("nan"), b=float("inf"))
    assert "NaN" not in (tmp_path / "run.log").read_text()
    assert lines(tmp_path / "run.log")[0] | {"a": "nan", "b": "inf"} == lines(tmp_path / "run.log")[0]


def test_a_cyclic_list_does_not_take_the_run_down(tmp_path):
    cyclic: list[object] = []
    cyclic.append(cyclic)
    open_log(tmp_path / "run.log", run="r").info("x", cyclic=cyclic)
    assert "<redacted: list>" in (tmp_path / "run.log").read_text()


def test_a_caller_cannot_forge_run_or_time(tmp_path):
    open_log(tmp_path / "run.log", run="mine").info("x", run="other", timestamp="1970", level="debug")
    (line,) = lines(tmp_path / "run.log")
    assert line["run"] == "mine"
    assert line["level"] == "info"
    assert line["timestamp"] != "1970"


def test_a_reopened_log_keeps_old_lines_and_closes_off_a_torn_one(tmp_path):
    path = tmp_path / "run.log"
    open_log(path, run="r").info("before")
    with path.open("a") as file:
        file.write('{"timestamp": "20')
    open_log(path, run="r").info("after")

    whole = path.read_text().splitlines()
    assert json.loads(whole[0])["event"] == "before"
    assert json.loads(whole[2])["event"] == "after"


def test_bind_adds_values_to_later_events_of_that_log_only(tmp_path):
    log = open_log(tmp_path / "run.log", run="r")
    log.bind(round=4).info("inside")
    log.info("outside")
    inside, outside = lines(tmp_path / "run.log")
    assert inside["round"] == 4
    assert "round" not in outside


def test_a_global_structlog_configuration_neither_matters_nor_changes(tmp_path):
    def drop(_logger, _name, _values):
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    try:
        before = structlog.get_config()
        open_log(tmp_path / "run.log", run="r").info("kept")
        assert structlog.get_config() == before
    finally:
        structlog.reset_defaults()
    assert lines(tmp_path / "run.log")[0]["event"] == "kept"


def test_positional_values_are_refused_so_that_nothing_is_formatted_into_the_event(tmp_path):
    with pytest.raises(TypeError):
        open_log(tmp_path / "run.log", run="r").info("norm %s", torch.tensor(41.5))  # type: ignore[call-arg]


def test_a_missing_directory_fails_when_the_log_is_opened_and_names_the_file(tmp_path):
    with pytest.raises(StorageError, match=r"absent/run\.log"):
        open_log(tmp_path / "absent" / "run.log", run="r")


def test_a_disk_that_fills_up_later_is_a_storage_error(tmp_path):
    path = tmp_path / "run.log"
    log = open_log(path, run="r")
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        log.info("x")
