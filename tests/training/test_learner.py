from dataclasses import replace
from pathlib import Path

import pytest
import torch

from devices import DEVICES
from dp_federated_lora.aggregation import FEDAVG, FFA, HEAD_ALONE
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import DataError, ModelError, StorageError
from dp_federated_lora.lora import Factor
from dp_federated_lora.training import Learner, LocalSteps, evaluate_model, example_scores, local_update
from dp_federated_lora.training.evaluation import macro_f1
from learners import bert, gpt2, learner_of, llama, llava, vit
from vision import LLAVA_IMAGES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [bert, llama, gpt2, vit, llava])
def test_the_cached_trunk_gives_the_same_losses_and_gradients_as_the_whole_model(make, device: str):
    results = []
    for cached in (False, True):
        learner, examples = learner_of(make, cached=cached, device=device)
        trained = list(learner.model.train_only(FEDAVG.factors).values())
        losses = learner.losses(examples, range(len(examples)))
        results.append((losses, torch.autograd.grad(losses.sum(), trained, materialize_grads=True)))
    (plain, gradients), (replayed, cached_gradients) = results
    assert torch.allclose(plain, replayed, atol=1e-12, rtol=0)
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(gradients, cached_gradients, strict=True))
    assert any(g.abs().max() > 1e-6 for g in gradients)


def test_the_trunk_really_is_left_out_and_put_back():
    learner, examples = learner_of(bert, cached=True)
    blocks = learner.model.module.backbone.base_model.model.encoder.layer
    originals, calls = list(blocks), []
    handle = originals[0].register_forward_hook(lambda *_: calls.append(1))
    learner.losses(examples, [0, 1])
    handle.remove()
    assert calls == []
    assert list(blocks) == originals


def test_what_is_prepared_already_is_not_computed_again():
    learner, examples = learner_of(bert, cached=True)
    calls = []
    handle = learner.model.module.backbone.base_model.model.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    learner.prepare(examples.subset([1, 3]))
    assert calls == []
    learner.prepare(Examples(((4, 9, 4, 9),), (0,)))
    assert calls == [1]
    handle.remove()


@pytest.mark.parametrize(("make", "keep_features"), [(bert, False), (bert, True), (llama, False), (vit, True), (llava, False)])
def test_a_later_run_finds_in_the_cache_what_an_earlier_one_kept(make, keep_features: bool, tmp_path: Path, monkeypatch):
    cache, results, computed = tmp_path / "cache", [], []
    gathered = Learner._gathered
    monkeypatch.setattr(Learner, "_gathered", lambda *args: computed.append(1) or gathered(*args))
    for folder in (None, cache, cache):
        learner, examples = learner_of(make, cached=True, keep_features=keep_features, cache=folder)
        trained = list(learner.model.train_only(HEAD_ALONE if keep_features else FEDAVG.factors).values())
        losses = learner.losses(examples, range(len(examples)))
        results.append([losses, *torch.autograd.grad(losses.sum(), trained, materialize_grads=True)])
    assert computed == [1, 1]  # once without a cache, once for it
    plain, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))
    (file,) = cache.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (cache, file)] == [0o700, 0o600]


def test_the_cache_knows_models_examples_and_depths_apart(tmp_path: Path):
    learner, examples = learner_of(bert, cached=True, cache=tmp_path)
    learner.prepare(Examples(((4, 9, 4, 9),), (0,)))
    learner_of(bert, cached=True, last_layers=2, cache=tmp_path)
    learner_of(bert, cached=True, keep_features=True, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    other, _ = learner_of(bert, cached=True)
    frozen = next(p for name, p in other.model.module.named_parameters() if Factor.of(name) is None)
    frozen.data[0, 0] += 1.0
    again = Learner(other.model, pad_id=0, batch_tokens=18, last_layers=1, cache=tmp_path)
    again.prepare(examples)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_cache_and_one_that_cannot_be_written_are_named(tmp_path: Path):
    learner_of(bert, cached=True, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StorageError, match="delete it"):
        learner_of(bert, cached=True, cache=tmp_path / "cache")
    with pytest.raises(StorageError, match="run.cache"):
        learner_of(bert, cached=True, cache=file / "below")


@pytest.mark.parametrize("make", [bert, llama, llava])
def test_padding_changes_no_loss(make):
    learner, examples = learner_of(make, cached=False, last_layers=None)
    together = learner.losses(examples, range(len(examples)))
    alone = torch.cat([learner.losses(examples, [i]) for i in range(len(examples))])
    assert torch.allclose(together, alone, atol=1e-10)


def test_last_layers_must_exist():
    with pytest.raises(ModelError, match=r"1\.\.3"):
        learner_of(bert, cached=False, last_layers=4)


def test_local_steps_lower_the_loss_and_a_client_without_examples_sends_zero():
    learner, examples = learner_of(bert, cached=False, last_layers=None)
    start, trained = learner.model.state(), learner.model.train_only(FEDAVG.factors)
    local = LocalSteps(steps=20, batch_size=3, learning_rate=0.5)
    before = float(learner.losses(examples, range(5)).detach().mean())
    change = local_update(learner, trained, examples, local, torch.Generator().manual_seed(0))
    assert float(learner.losses(examples, range(5)).detach().mean()) < before
    assert change.abs().max() > 0
    learner.model.load(start)
    nothing = local_update(learner, trained, examples.subset([]), local, torch.Generator().manual_seed(0))
    assert not nothing.any()


def test_evaluation_of_language_models_weighs_every_token_once_and_needs_examples():
    learner, examples = learner_of(llama, cached=False, last_layers=None)
    lengths = torch.tensor([len(t) - 1 for t in examples.tokens])
    losses = torch.cat([learner.losses(examples, [i]) for i in range(len(examples))])
    losses = losses.detach()
    scores = evaluate_model(learner, examples)
    assert scores["loss"] == pytest.approx(float((losses * lengths).sum() / lengths.sum()))
    assert scores["perplexity"] == pytest.approx(float(torch.tensor(scores["loss"]).exp()), rel=1e-5)
    with pytest.raises(DataError, match="no test examples"):
        evaluate_model(learner, examples.subset([]))


def test_macro_f1_by_hand():
    labels, predicted = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    # F1: class 0 2/4, class 1 4/5, class 2 0
    assert macro_f1(labels, predicted) == pytest.approx((0.5 + 0.8 + 0.0) / 3)


def test_text_after_an_image_is_predicted_and_the_image_is_not():
    learner, examples = learner_of(llava, cached=True)
    scores, positions = evaluate_model(learner, examples), LLAVA_IMAGES.positions
    total = count = 0.0
    for index, tokens in enumerate(examples.tokens):
        logits, ids, _ = learner.logits(examples, [index])
        guesses = logits[0, positions - 1 : -1].detach().log_softmax(dim=1)
        total -= float(guesses.gather(1, ids[0, positions:, None]).sum())
        count += len(tokens) - positions
    assert scores["loss"] == pytest.approx(total / count)
    blank = replace(examples, images=(bytes(192),) * 4)
    assert evaluate_model(learner, blank)["loss"] != pytest.approx(scores["loss"], rel=1e-6)


def test_lora_stays_in_the_language_model_and_in_its_last_layers():
    learner, _ = learner_of(llava, cached=False, last_layers=2)
    adapted = {name.split(".lora_")[0] for name in learner.model.state()}
    prefix = "base_model.model.model.language_model.layers"
    assert adapted == {f"{prefix}.{n}.self_attn.{target}" for n in (1, 2) for target in ("q_proj", "v_proj")}


@pytest.mark.parametrize("cached", [False, True])
def test_kept_features_serve_the_head_alone_and_only_while_they_hold(cached: bool, monkeypatch: pytest.MonkeyPatch):
    plain, examples = learner_of(bert, cached=False)
    kept, _ = learner_of(bert, cached=cached, keep_features=True)
    passes = []
    features = type(kept.model.module).features
    monkeypatch.setattr(type(kept.model.module), "features", lambda *a: passes.append(1) or features(*a))

    def losses_and_head_gradients(learner: Learner, factors: frozenset[Factor]) -> list[torch.Tensor]:
        trained = learner.model.train_only(factors)
        losses = learner.losses(examples, range(len(examples)))
        return [losses, *torch.autograd.grad(losses.sum(), list(trained.values()), materialize_grads=True)]

    for factors, recomputed in ((HEAD_ALONE, 0), (FFA.factors, 1)):  # the adapter has not moved, but wants gradients
        expected = losses_and_head_gradients(plain, factors)
        passes.clear()
        got = losses_and_head_gradients(kept, factors)
        assert len(passes) == recomputed
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(expected, got, strict=True))

    # Only where the whole model has to run do lengths matter: 16 tokens for each kept row, 9, 7, 5, 3 and 2 of text.
    sizes = [len(batch) for batch in kept.batches(examples, range(5))]
    kept.model.train_only(HEAD_ALONE)
    assert (sizes, [len(batch) for batch in kept.batches(examples, range(5))]) == ([3, 2], [1, 1, 1, 1, 1])

    moved = {n: t + 0.1 for n, t in kept.model.state().items() if "lora_B" in n}
    for learner in (plain, kept):
        learner.model.load(moved)
    expected = losses_and_head_gradients(plain, HEAD_ALONE)
    passes.clear()
    got = losses_and_head_gradients(kept, HEAD_ALONE)
    assert passes == [1]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("make", [bert, llama])
def test_scores_of_single_examples_add_up_to_those_of_the_set(make):
    learner, examples = learner_of(make, cached=True)
    correct, losses = example_scores(learner, examples)
    whole = evaluate_model(learner, examples)
    if examples.labels is not None:
        assert float(correct.mean()) == pytest.approx(whole["accuracy"])
        return
    lengths = torch.tensor([len(tokens) - 1 for tokens in examples.tokens])
    assert float((losses * lengths).sum() / lengths.sum()) == pytest.approx(whole["loss"], rel=1e-5)
    for index, tokens in enumerate(examples.tokens):  # alone, without padding
        guessed = learner.logits(examples, [index])[0][0, :-1].argmax(dim=1)
        assert float(correct[index]) == pytest.approx(float((guessed == torch.tensor(tokens[1:])).double().mean()))
