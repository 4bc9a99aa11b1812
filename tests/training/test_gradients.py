import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from devices import DEVICES
from dp_federated_lora.aggregation import FEDAVG
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.lora import AdaptedModel, Factor, Task, adapt
from dp_federated_lora.training import Learner, fused
from dp_federated_lora.training.fused import LoraLayer
from dp_federated_lora.training.gradients import ExampleGradients
from vision import LLAVA_IMAGES, VIT_IMAGES, llava_backbone, some_images


def bert(**options: object) -> AdaptedModel:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    backbone = BertModel(config).eval().requires_grad_(False)
    return adapted(backbone, Task.CLASSIFICATION, ["query", "dense"], **options)


def bert_of_which_the_last_layer_is_adapted() -> AdaptedModel:
    return bert(last_layers=1)


def llama() -> AdaptedModel:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return adapted(LlamaForCausalLM(config).eval().requires_grad_(False), Task.CAUSAL_LM, ["q_proj", "v_proj", "down_proj"])


def gpt2() -> AdaptedModel:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return adapted(GPT2LMHeadModel(config).eval().requires_grad_(False), Task.CAUSAL_LM, ["c_attn", "c_proj"])


def vit() -> AdaptedModel:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    return adapted(ViTModel(config).eval().requires_grad_(False), Task.CLASSIFICATION, ["q_proj", "v_proj", "fc1"])


def llava() -> AdaptedModel:
    return adapted(llava_backbone(), Task.IMAGE_TEXT, ["q_proj", "v_proj", "linear_1"], vision_tower=True)


def adapted(backbone: nn.Module, task: Task, targets: list[str], **options: object) -> AdaptedModel:
    options = {"last_layers": None, **options}
    model = adapt(backbone, task=task, classes=3, rank=2, alpha=4.0, targets=targets, seed=0, pooling="mean", **options)
    generator = torch.Generator().manual_seed(1)
    # B away from zero, so that A has gradients too.
    model.load({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in model.state().items()})
    return model


def some_examples(labelled: bool) -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 7, 5, 9]
    tokens = tuple(tuple(torch.randint(1, 50, (n,), generator=generator).tolist()) for n in lengths)
    return Examples(tokens, (0, 1, 2, 1) if labelled else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [bert, llama, gpt2, vit, llava])
def test_per_example_gradients_equal_a_loop_of_single_example_autograd(make, device: str):
    with torch.random.fork_rng():
        model = make()
    model.module.to(device)
    images = {vit: VIT_IMAGES, llava: LLAVA_IMAGES}.get(make)
    examples = some_images(images, model.task) if images else some_examples(model.task is Task.CLASSIFICATION)
    learner = Learner(model, pad_id=0, batch_tokens=1000, last_layers=None, images=images)
    trained = model.train_only(FEDAVG.factors)
    with ExampleGradients(model.module, trained) as gradients:
        rows = gradients.rows(learner.losses(examples, range(len(examples))))
    for index, row in enumerate(rows):
        alone = torch.autograd.grad(learner.losses(examples, [index]).sum(), list(trained.values()), materialize_grads=True)
        expected = torch.cat([g.flatten() for g in alone])
        assert expected.abs().max() > 1e-3
        assert torch.allclose(row, expected, atol=1e-5)


def test_hooks_are_gone_after_use_and_nothing_is_planted_on_parameters():
    with torch.random.fork_rng():
        model = bert()
    trained = model.train_only(FEDAVG.factors)
    learner = Learner(model, pad_id=0, batch_tokens=1000, last_layers=None)
    with ExampleGradients(model.module, trained) as gradients:
        gradients.rows(learner.losses(some_examples(True), [0, 1]))
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in trained.values())
    assert not any(m._forward_hooks for m in model.module.modules())


def test_parameters_outside_linear_layers_are_refused():
    layer = nn.LayerNorm(4)
    with pytest.raises(IncompatiblePlan, match=r"nn\.Linear layers only"):
        ExampleGradients(nn.Sequential(layer), {"norm": layer.weight})


def test_a_layer_that_sees_several_rows_of_one_example_is_refused():
    layer = nn.Linear(3, 3)
    with ExampleGradients(nn.Sequential(layer), dict(layer.named_parameters())) as gradients:
        losses = layer(torch.ones(4, 3)).reshape(2, 2, 3).sum(dim=(1, 2))  # two images of each example, flattened
        with pytest.raises(IncompatiblePlan, match="saw 4 rows of 2 examples"):
            gradients.rows(losses)


def test_a_layer_used_twice_in_one_forward_pass_is_refused():
    layer = nn.Linear(3, 3)
    with ExampleGradients(nn.Sequential(layer), dict(layer.named_parameters())) as gradients:
        losses = layer(layer(torch.ones(2, 3))).sum(dim=1)
        with pytest.raises(IncompatiblePlan, match="used twice"):
            gradients.rows(losses)


def lora_layers(model: AdaptedModel) -> list[nn.Module]:
    return [module for module in model.module.modules() if hasattr(module, "base_layer")]


def rows_of(model: AdaptedModel, trained: dict[str, nn.Parameter], examples: Examples, learner: Learner) -> Tensor:
    with ExampleGradients(model.module, trained) as gradients:
        return gradients.rows(learner.losses(examples, range(len(examples))))


@pytest.mark.parametrize("factors", [{Factor.A}, {Factor.B}, {Factor.A, Factor.B, Factor.HEAD}])
@pytest.mark.parametrize("make", [bert, bert_of_which_the_last_layer_is_adapted, llama])
def test_fused_layers_give_the_gradients_of_single_example_autograd_in_float64(make, factors, monkeypatch):
    calls, run = [], fused._run
    monkeypatch.setattr(fused, "_run", lambda *arguments: calls.append(1) or run(*arguments))
    with torch.random.fork_rng():
        model = make()
    trained = model.train_only(frozenset(factors))
    model.module.double()
    examples = some_examples(model.task is Task.CLASSIFICATION)
    top = 1 if make is bert_of_which_the_last_layer_is_adapted else None
    learner = Learner(model, pad_id=0, batch_tokens=1000, last_layers=top)
    learner.prepare(examples)
    rows = rows_of(model, trained, examples, learner)
    assert len(calls) == len(lora_layers(model))
    assert rows.dtype == torch.float64
    for index, row in enumerate(rows):
        alone = torch.autograd.grad(learner.losses(examples, [index]).sum(), list(trained.values()), materialize_grads=True)
        expected = torch.cat([g.flatten() for g in alone])
        assert expected.abs().max() > 1e-3
        assert torch.allclose(row, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_base_weights_under_float32_factors_give_what_hooks_on_peft_give(monkeypatch):
    with torch.random.fork_rng():
        model = bert()
    trained, examples = model.train_only(FEDAVG.factors), some_examples(True)
    model.module.bfloat16()
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    layer = lora_layers(model)[0]
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    learner = Learner(model, pad_id=0, batch_tokens=1000, last_layers=None)
    with ExampleGradients(model.module, trained):
        result = layer(x)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result, layer(x), rtol=2**-7, atol=0.0)
    rows = rows_of(model, trained, examples, learner)
    monkeypatch.setattr(LoraLayer, "of", lambda _: None)
    hooked = rows_of(model, trained, examples, learner)
    assert rows.dtype == torch.float32
    assert torch.linalg.vector_norm(rows - hooked) < 0.02 * torch.linalg.vector_norm(hooked)


@pytest.mark.parametrize("options", [{"cores": True}, {"increments": True}])
def test_layers_with_parts_of_our_own_are_not_fused(options):
    with torch.random.fork_rng():
        layers = lora_layers(bert(**options))
    assert layers
    assert not any(map(LoraLayer.of, layers))


def test_layers_of_which_nothing_is_trained_run_as_they_are():
    with torch.random.fork_rng():
        model = bert()
    with ExampleGradients(model.module, model.train_only(frozenset({Factor.HEAD}))):
        assert not any("forward" in vars(layer) for layer in lora_layers(model))


def test_layers_that_are_transposed_merged_switched_off_or_have_dropout_are_not_fused():
    with torch.random.fork_rng():
        transposed, [one, two, three, *others] = lora_layers(gpt2()), lora_layers(bert())
    one.merge()
    two.enable_adapters(enabled=False)
    three.lora_dropout["default"] = nn.Dropout(0.1)
    assert not any(map(LoraLayer.of, [*transposed, one, two, three]))
    assert all(map(LoraLayer.of, others))


def test_forwards_are_restored_on_exit_and_after_an_error():
    with torch.random.fork_rng():
        model = bert()
    trained = model.train_only(FEDAVG.factors)
    with pytest.raises(RuntimeError, match="in between"), ExampleGradients(model.module, trained):
        assert all("forward" in vars(layer) for layer in lora_layers(model))
        raise RuntimeError("in between")
    assert not any("forward" in vars(module) for module in model.module.modules())


def test_a_second_collector_on_open_fused_layers_is_refused_and_changes_nothing():
    with torch.random.fork_rng():
        model = bert()
    trained = model.train_only(FEDAVG.factors)
    last = dict(list(trained.items())[-4:])
    with ExampleGradients(model.module, last):
        before = [vars(module).get("forward") for module in model.module.modules()]
        with pytest.raises(IncompatiblePlan, match="in use already"), ExampleGradients(model.module, trained):
            pass
        assert [vars(module).get("forward") for module in model.module.modules()] == before


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer: layer(layer(torch.ones(2, 3, 16))).sum(dim=(1, 2)), "used twice"),
        (lambda layer: layer(torch.ones(4, 16)).reshape(2, 2, 16).sum(dim=(1, 2)), "saw 4 rows of 2 examples"),
    ],
)
def test_fused_layers_refuse_what_hooks_refuse(use, message):
    with torch.random.fork_rng():
        model = bert()
    layer = lora_layers(model)[0]
    trained = {name: p for name, p in layer.named_parameters() if "lora" in name}
    with ExampleGradients(layer, trained) as gradients, pytest.raises(IncompatiblePlan, match=message):
        gradients.rows(use(layer))


def test_a_backward_pass_of_something_else_through_open_fused_layers_is_refused():
    with torch.random.fork_rng():
        model = bert()
    trained, examples = model.train_only(FEDAVG.factors), some_examples(True)
    learner = Learner(model, pad_id=0, batch_tokens=1000, last_layers=None)
    with ExampleGradients(model.module, trained) as gradients:
        gradients.rows(learner.losses(examples, [0, 1]))
        with pytest.raises(IncompatiblePlan):
            torch.autograd.backward(learner.losses(examples, [0, 1]).sum())
