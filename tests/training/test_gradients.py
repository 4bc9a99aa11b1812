import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from dp_federated_lora.aggregation import FEDAVG
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.lora import AdaptedModel, Task, adapt
from dp_federated_lora.training import Learner
from dp_federated_lora.training.gradients import ExampleGradients
from vision import LLAVA_IMAGES, VIT_IMAGES, llava_backbone, some_images


def bert() -> AdaptedModel:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    backbone = BertModel(config).eval().requires_grad_(False)
    return adapted(backbone, Task.CLASSIFICATION, ["query", "dense"])


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


def adapted(backbone: nn.Module, task: Task, targets: list[str], *, vision_tower: bool = False) -> AdaptedModel:
    model = adapt(
        backbone,
        task=task,
        classes=3,
        rank=2,
        alpha=4.0,
        targets=targets,
        last_layers=None,
        seed=0,
        pooling="mean",
        vision_tower=vision_tower,
    )
    generator = torch.Generator().manual_seed(1)
    # B away from zero, so that A has gradients too.
    model.load({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in model.state().items()})
    return model


def some_examples(labelled: bool) -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 7, 5, 9]
    tokens = tuple(tuple(torch.randint(1, 50, (n,), generator=generator).tolist()) for n in lengths)
    return Examples(tokens, (0, 1, 2, 1) if labelled else None)


@pytest.mark.parametrize("make", [bert, llama, gpt2, vit, llava])
def test_per_example_gradients_equal_a_loop_of_single_example_autograd(make):
    with torch.random.fork_rng():
        model = make()
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
