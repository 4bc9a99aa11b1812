"""What clients keep between rounds: found again after a crash, never silently lost, and free of charge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.aggregation import FFA, METHODS
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import CheckpointError, IncompatiblePlan
from dp_federated_lora.federated import Client, ClientMemory
from dp_federated_lora.privacy import Composition, GaussianMechanism, PoissonSampler, PrivacyUnit
from dp_federated_lora.training import LocalSteps
from plans import a_plan

NAMES = ["ann", "bob"]


def state(value: float) -> dict[str, torch.Tensor]:
    return {"x.lora_B.y": torch.full((2, 3), value), "x.control": torch.full((4,), -value, dtype=torch.float64)}


def equal(first: object, second: dict[str, torch.Tensor]) -> bool:
    return isinstance(first, dict) and first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in second)


@pytest.fixture
def memory(tmp_path: Path) -> ClientMemory:
    fresh = ClientMemory(tmp_path / "clients")
    fresh.rewind(NAMES, 0)
    return fresh


def test_a_round_starts_from_the_state_before_it_however_often_it_is_computed(memory: ClientMemory, tmp_path: Path):
    assert equal(memory.before("ann", 1), {})
    memory.keep("ann", 1, state(1.0))
    assert equal(memory.before("ann", 1), {})  # killed after this write, round 1 begins as it did
    memory.keep("ann", 4, state(4.0))
    memory.keep("ann", 4, state(4.5))
    again = ClientMemory(tmp_path / "clients")  # another process
    assert equal(again.before("ann", 4), state(1.0))
    assert equal(again.before("ann", 5), state(4.5))
    assert equal(again.before("bob", 5), {})
    memory.keep("ann", 6, state(6.0))
    assert equal(memory.before("ann", 6), state(4.5))
    assert [(tmp_path / "clients" / f"{name}.safetensors").stat().st_mode & 0o777 for name in NAMES] == [0o600, 0o600]
    assert (tmp_path / "clients").stat().st_mode & 0o777 == 0o700


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=8))
def test_whatever_is_killed_states_are_those_of_an_undisturbed_run(tmp_path_factory: pytest.TempPathFactory, rounds: list):
    memory = ClientMemory(tmp_path_factory.mktemp("m") / "clients")
    memory.rewind(NAMES, 0)
    undisturbed: dict[str, torch.Tensor] = {}
    for number, (takes_part, deaths) in enumerate(rounds, start=1):
        for _ in range(deaths):
            memory.keep("ann", number, state(-1.0))  # an attempt whose key was lost
            memory.rewind(NAMES, number - 1)
        assert equal(memory.before("ann", number), undisturbed)
        if takes_part:
            undisturbed = state(float(number))
            memory.keep("ann", number, undisturbed)
    assert equal(memory.before("ann", len(rounds) + 1), undisturbed)


def test_a_state_that_is_missing_damaged_or_somebody_elses_is_an_error(memory: ClientMemory, tmp_path: Path):
    ann, bob = (tmp_path / "clients" / f"{name}.safetensors" for name in NAMES)
    memory.keep("ann", 2, state(1.0))
    whole = ann.read_bytes()
    for content, message in ((whole[:-1], "cannot be read"), (whole[:-1] + b"\x7f", "damaged"), (b"", "cannot be read")):
        ann.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"client state .*{message}"):
            memory.before("ann", 3)
    bob.write_bytes(whole)
    with pytest.raises(CheckpointError, match="is of ann: put the files back"):
        memory.before("bob", 3)
    ann.unlink()
    for use in (lambda: memory.before("ann", 3), lambda: memory.keep("ann", 3, state(0.0)), lambda: memory.rewind(["ann"], 2)):
        with pytest.raises(CheckpointError, match="backup of the run directory, or start a new run"):
            use()


def test_state_is_refused_where_nothing_is_claimed_about_it(memory: ClientMemory):
    nothing = Examples((), None)
    steps = LocalSteps(steps=2, batch_size=1, learning_rate=0.1)
    with pytest.raises(IncompatiblePlan, match="ClientMemory"):
        Client("ann", nothing, a_plan(), METHODS["fedsa"], steps, nothing)
    with pytest.raises(IncompatiblePlan, match="unit = client"):
        Client("ann", nothing, a_plan(unit=PrivacyUnit.EXAMPLE), METHODS["fedsa"], steps, nothing, memory=memory)
    assert not Client("ann", nothing, a_plan(), FFA, steps, nothing).keeps_state


# --- what state costs -------------------------------------------------------------------------------


def exact_deltas(epsilon: float, second: object, *, rate: float) -> float:
    """Larger hockey-stick divergence of two rounds with noise of std 1, on a grid, with and without a unit.

    The unit gives 1 in the first round, and `second(took part, first output)` in the second: it remembers its first coin.
    """
    y = np.linspace(-9.0, 10.0, 1901)

    def density(x: object, mean: object) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / 2) / np.sqrt(2 * np.pi)

    first, then = y[:, None], y[None, :]
    without = density(first, 0.0) * density(then, 0.0)
    joint = np.zeros_like(without)
    for took_part, chance in ((False, 1 - rate), (True, rate)):
        later = (1 - rate) * density(then, 0.0) + rate * density(then, second(took_part, first))
        joint += chance * density(first, float(took_part)) * later
    cell = (y[1] - y[0]) ** 2
    pairs = ((joint, without), (without, joint))
    return max(float(np.maximum(p - np.exp(epsilon) * q, 0.0).sum() * cell) for p, q in pairs)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_a_unit_that_remembers_its_coins_loses_no_more_than_one_that_does_not(delta: float, rate: float):
    composed = Composition()
    composed.add(PoissonSampler(rate).amplify(GaussianMechanism(1.0).event), 2)
    epsilon = composed.epsilon(delta)
    ways = {
        "louder after taking part": lambda took, y: 1.0 if took else 0.0,
        "louder after not taking part": lambda took, y: 0.0 if took else 1.0,
        "against the first output": lambda took, y: np.where((y > 0.5) == took, 1.0, -1.0),
        "with the first output": lambda took, y: np.where((y > 0.5) == took, -1.0, 1.0),
    }
    for way in ways.values():
        assert exact_deltas(epsilon, way, rate=rate) <= delta
    assert exact_deltas(epsilon, lambda took, y: 1.0, rate=rate) == pytest.approx(delta, rel=0.02)  # the ordinary rounds
    assert exact_deltas(epsilon, lambda took, y: 1.4, rate=rate) > delta  # a broken clip would be seen
