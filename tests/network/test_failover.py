"""A run goes on when the coordinator at work, or a broker of a cluster, is killed for good and another one stands by.

`pytest -m slow -s` prints the seconds from a death to the next published round.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dp_federated_lora import train
from federation import adapter_bytes, networked
from programs import SITES, Programs

Raw = dict[str, dict[str, object]]
ROUNDS = 30


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["coordinator", "broker"])
def test_another_one_takes_over(raw_config: Raw, tmp_path: Path, victim: str):
    config = networked(raw_config, rounds=ROUNDS)
    expected = adapter_bytes(train(config, out=tmp_path / "simulated").path)
    with ExitStack() as stack:
        programs = Programs(config, tmp_path / "network", stack, brokers=3, coordinators=2)
        programs.submit()
        programs.wait_for(5)
        before, start = programs.rounds, time.monotonic()
        programs.kill(victim)
        programs.wait_for(before + 1)
        print(f"\n{victim} killed: the next round after {time.monotonic() - start:.2f} s")
        status = programs.end_of_run()
    assert (status["state"], status["reason"], status["round"]) == ("finished", "", ROUNDS)
    assert [programs.charges(name) for name in SITES] == [ROUNDS] * len(SITES)
    assert adapter_bytes(programs.run) == expected
