"""Programs of a federation are killed with SIGKILL at random moments and started again: nothing is lost, doubled or overspent."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from dp_federated_lora import train
from dp_federated_lora.errors import LedgerCorrupt, LedgerLocked
from dp_federated_lora.lab.ledgers import ledgers_at
from federation import adapter_bytes, networked
from programs import SITES, Programs

Raw = dict[str, dict[str, object]]
KILLS = 25  # a case; each kind of victim dies a hundred times in its four
ROUNDS = 150


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("victims", [["coordinator"], SITES, ["broker"], ["coordinator", *SITES, "broker"]], ids=str)
def test_killed_programs_come_back_and_the_adapter_is_the_simulators(
    raw_config: Raw, tmp_path: Path, victims: list[str], seed: int
):
    config, draw = networked(raw_config, rounds=ROUNDS), random.Random(seed)
    expected = adapter_bytes(train(config, out=tmp_path / "simulated").path)
    with ExitStack() as stack:
        programs = Programs(config, tmp_path / "network", stack)
        programs.submit()
        spent = dict.fromkeys(SITES, 0)
        for _ in range(KILLS):
            programs.wait_for(programs.rounds + draw.randrange(4))  # at none, while a program starts
            time.sleep(draw.uniform(0.0, 0.5))
            victim = draw.choice(victims)
            programs.kill(victim)
            programs.start(victim)
            for name in SITES:
                with suppress(LedgerCorrupt, LedgerLocked):  # it may be just beginning, or be written to
                    charges = programs.charges(name)
                    assert charges >= spent[name]
                    spent[name] = charges
        assert programs.rounds < ROUNDS, "the run was over before the last death"
        status = programs.end_of_run()
    assert (status["state"], status["reason"]) == ("finished", "")
    (ledger,) = ledgers_at(str(programs.run))
    assert (ledger.spent().charges, ledger.spent().released) == (ROUNDS, ROUNDS)
    assert [programs.charges(name) for name in SITES] == [ROUNDS] * len(SITES)
    assert adapter_bytes(programs.run) == expected
