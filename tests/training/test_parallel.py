"""Work on several cores: the same bits, in order, a few at a time, and failures as they come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dp_federated_lora.aggregation import FEDAVG, HEAD_ALONE
from dp_federated_lora.data import Examples
from dp_federated_lora.lora import Factor
from dp_federated_lora.privacy import UnitId
from dp_federated_lora.training import Learner, LocalSteps, evaluate_model, example_gradients, example_scores, local_update
from dp_federated_lora.training.parallel import in_parallel
from learners import bert, gpt2, learner_of, llama, llava, vit

STEPS = LocalSteps(steps=2, batch_size=3, learning_rate=0.1)


@pytest.fixture
def one_core() -> Iterator[None]:
    """What is computed in this thread is computed on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("make", [bert, llama, gpt2, vit, llava])
@pytest.mark.parametrize("cached", [False, True])
def test_any_number_of_threads_gives_the_same_bits(make, cached: bool):
    results = []
    for threads in (1, 3):
        learner, examples = learner_of(make, cached=cached, threads=threads)

        def gradients(twin: Learner, share: tuple[int, int], examples: Examples = examples) -> list[torch.Tensor]:
            trained = twin.model.train_only(FEDAVG.factors)
            units = [UnitId(str(index)) for index in range(len(examples))]
            return [rows for rows, _ in example_gradients(twin, trained, examples, units, share=share)]

        def steps(twin: Learner, seed: int, examples: Examples = examples) -> torch.Tensor:
            start = twin.model.state()
            trained = twin.model.train_only(FEDAVG.factors)
            update = local_update(twin, trained, examples, STEPS, torch.Generator().manual_seed(seed))
            twin.model.load(start)
            return update

        parts = [torch.cat(rows) for rows in learner.spread(gradients, [(k, 2) for k in range(2)])]
        updates = list(learner.spread(steps, range(7)))
        before = learner.model.state()
        scores = example_scores(learner, examples)
        results.append((*parts, *updates, *scores, torch.tensor([*evaluate_model(learner, examples).values()])))
        assert all(torch.equal(before[name], value) for name, value in learner.model.state().items())
    one, several = results
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    assert all(bool(update.any()) for update in one[2:9])


def test_features_that_are_kept_serve_every_thread(monkeypatch: pytest.MonkeyPatch):
    learner, examples = learner_of(bert, cached=True, keep_features=True, threads=2)
    learner.model.train_only(HEAD_ALONE)
    expected = learner.losses(examples, range(len(examples)))
    monkeypatch.setattr(type(learner.model.module), "features", lambda *_, **__: pytest.fail("features were kept"))

    def loss(twin: Learner, index: int) -> torch.Tensor:
        twin.model.train_only(HEAD_ALONE)
        return twin.losses(examples, [index])

    found = list(learner.spread(loss, range(len(examples))))
    assert torch.allclose(torch.cat(found), expected, atol=1e-12)


def test_threads_share_frozen_weights_and_have_adapters_of_their_own():
    learner, _ = learner_of(bert, cached=True, threads=2)
    models = {id(twin.model): twin.model for twin in learner.spread(lambda twin, _: twin, range(8))}
    assert id(learner.model) not in models
    kinds = {name: Factor.of(name) for name, _ in learner.model.module.named_parameters()}
    for model in models.values():
        pairs = zip(learner.model.module.named_parameters(), model.module.named_parameters(), strict=True)
        assert all((mine is theirs) == (kinds[name] is None) for (name, mine), (_, theirs) in pairs)


def test_results_come_in_order_and_no_more_than_a_few_wait():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = in_parallel(["a", "b"], lambda _, item: item, items())
    for expected in range(100):
        assert next(results) == expected
        assert len(taken) <= expected + 10


def test_each_tool_is_used_by_one_call_at_a_time_on_one_core():
    before, busy, cores = torch.get_num_threads(), {"a": threading.Lock(), "b": threading.Lock()}, set[int]()

    def work(tool: str, _: int) -> str:
        assert busy[tool].acquire(blocking=False)
        cores.add(torch.get_num_threads())
        torch.randn(200, 200) @ torch.randn(200, 200)
        busy[tool].release()
        return tool

    torch.set_num_threads(3)
    try:
        assert set(in_parallel([*busy], work, range(50))) <= {"a", "b"}
        assert (cores, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_a_failure_is_raised_in_its_turn_and_nothing_new_is_begun():
    begun = []

    def work(_: str, item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("no example has this label")
        return item

    results, before = in_parallel(["a", "b"], work, range(1000)), torch.get_num_threads()
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no example"):
        next(results)
    assert max(begun) < 20
    assert torch.get_num_threads() == before
