"""What each method trains, what its mean means, and what the server makes of it (closed forms)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dp_federated_lora import evaluate, train
from dp_federated_lora.aggregation import METHODS, Adam
from dp_federated_lora.aggregation.lora.fedask import split_anew
from dp_federated_lora.data import Examples
from dp_federated_lora.lab.config import GATHERED, LINEAR, parse_config
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.lora import Factor
from dp_federated_lora.training import LocalSteps, local_update
from saved import with_peft

Raw = dict[str, dict[str, object]]
A, B, CORE, HEAD = Factor.A, Factor.B, Factor.CORE, Factor.HEAD


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(raw: Raw, method: str) -> None:
    """Name the method, and set what it cannot do without."""
    raw["method"] = {"name": method}
    if method in GATHERED:
        raw["privacy"] |= {"trust": "local", "sampling_rate": 1.0}


def bench_of(raw: Raw, method: str) -> tuple[Workbench, Examples]:
    named(raw, method)
    bench = Workbench.of(parse_config(raw, where="test"))
    examples = bench.test_examples()
    assert examples is not None
    return bench, examples


def test_the_configuration_names_every_method():
    assert {*LINEAR, *GATHERED} == set(METHODS)
    assert {name for name, method in METHODS.items() if method.gather} == set(GATHERED)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_averaging_both_factors_errs_by_their_covariance_and_one_frozen_factor_errs_by_nothing(count: int, rank: int, seed: int):
    b, a = [normal(9, rank, seed=seed + k) for k in range(count)], [normal(rank, 7, seed=seed + 10 + k) for k in range(count)]
    mean_b, mean_a = sum(b) / count, sum(a) / count
    true = sum(x @ y for x, y in zip(b, a, strict=True)) / count
    covariance = sum((x - mean_b) @ (y - mean_a) for x, y in zip(b, a, strict=True)) / count
    assert torch.allclose(mean_b @ mean_a + covariance, true, atol=1e-12)
    if count > 1:
        assert covariance.norm() > 0.01 * true.norm()
    assert torch.allclose(mean_b @ a[0], sum(x @ a[0] for x in b) / count, atol=1e-12)


def test_noise_on_both_factors_is_amplified_as_the_formula_says():
    m, n, r, sigma, draws = 40, 30, 4, 0.1, 4000
    b, a = normal(m, r, seed=1), normal(r, n, seed=2)
    noise_b, noise_a = sigma * normal(draws, m, r, seed=3), sigma * normal(draws, r, n, seed=4)
    both = ((b + noise_b) @ (a + noise_a) - b @ a).square().sum(dim=(1, 2))
    one = (noise_b @ a).square().sum(dim=(1, 2))
    expected_one = sigma**2 * m * a.square().sum()
    expected_both = expected_one + sigma**2 * n * b.square().sum() + sigma**4 * m * n * r
    for sample, expected in ((both, expected_both), (one, expected_one)):
        assert abs(sample.mean() - expected) < 5.5 * sample.std() / math.sqrt(draws)  # false alarm below 1e-7


def test_turns_follow_the_rounds_after_the_head_and_nothing_else():
    rolora = replace(METHODS["rolora"], head_rounds=2)
    assert [rolora.factors_in(n) for n in range(1, 6)] == [{HEAD}, {HEAD}, {B, HEAD}, {A, HEAD}, {B, HEAD}]
    assert rolora.factors_in(3) == {B, HEAD}  # asking again does not advance it
    lalora = replace(METHODS["lalora"], head_rounds=1)
    assert lalora.factors_in(2) == {A, B, HEAD}
    assert lalora.local_factors(2) == ({B, HEAD}, {A, HEAD})
    assert set(lalora.local_factors(1)) == {frozenset({HEAD})}


@pytest.mark.parametrize("method", ["ffa", "rolora", "fedask", "fedsb"])
def test_the_frozen_factor_has_no_gradient_and_does_not_move(raw_config: Raw, method: str):
    bench, examples = bench_of(raw_config, method)
    start = bench.model.state()
    sent = bench.method.factors_in(1)
    trained = bench.model.train_only(sent)
    local = LocalSteps(steps=2, batch_size=8, learning_rate=0.5)
    local_update(bench.learner, trained, examples, local, torch.Generator().manual_seed(0))
    for name, value in bench.model.state().items():
        assert torch.equal(value, start[name]) or Factor.of(name) in sent
    frozen = [p for n, p in bench.model.parameters(frozenset(Factor)).items() if Factor.of(n) not in sent]
    assert frozen and all(p.grad is None for p in frozen)


def test_lalora_trains_one_factor_in_each_local_step(client_config: Raw):
    bench, examples = bench_of(client_config, "lalora")
    start = {name: normal(*tensor.shape, seed=0).float() for name, tensor in bench.model.state().items()}  # no gradient is zero
    trained = bench.model.train_only(bench.method.factors)
    turns = [bench.model.parameters(factors) for factors in bench.method.local_factors(1)]
    moved = []
    for steps in (1, 2):
        bench.model.load(start)
        local = LocalSteps(steps=steps, batch_size=8, learning_rate=0.5)
        local_update(bench.learner, trained, examples, local, torch.Generator().manual_seed(0), turns=turns)
        state = bench.model.state()
        moved.append({Factor.of(name) for name in state if not torch.equal(state[name], start[name])})
    assert moved == [{B, HEAD}, {A, B, HEAD}]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_fedask_splits_the_product_anew_and_keeps_it(rank: int, seed: int):
    pair = {"x.lora_A.y": normal(rank, 12, seed=seed).float(), "x.lora_B.y": normal(20, rank, seed=seed + 1).float()}
    split = split_anew(pair | {"head.weight": torch.ones(3)}, frozenset((B, HEAD)))
    before, after = (t["x.lora_B.y"].double() @ t["x.lora_A.y"].double() for t in (pair, split))
    assert torch.allclose(before, after, atol=1e-4 * float(before.norm()))
    left, right = (t.double() for t in (split["x.lora_B.y"], split["x.lora_A.y"]))
    singular = torch.linalg.svdvals(before)[:rank]
    assert torch.allclose(left.T @ left, singular.diag(), atol=1e-4 * float(singular[0]))
    assert torch.allclose(right @ right.T, singular.diag(), atol=1e-4 * float(singular[0]))
    assert torch.equal(split["head.weight"], torch.ones(3))


def test_fedask_leaves_a_product_alone_that_lacks_its_rank():
    pair = {"x.lora_A.y": normal(2, 5, seed=0).float(), "x.lora_B.y": torch.zeros(4, 2)}
    assert all(torch.equal(split_anew(pair, frozenset((B, HEAD)))[name], tensor) for name, tensor in pair.items())


def test_a_double_sketch_of_products_with_one_a_is_no_better_than_one_sum():
    # The paper's two stages, for clients that share A: Q from sum B_k (A Omega), then the product projected on Q.
    a, omega = normal(3, 12, seed=0), normal(12, 3, seed=1)
    b = [normal(20, 3, seed=2 + k) for k in range(5)]
    q = torch.linalg.qr(sum(x @ (a @ omega) for x in b) / 5).Q
    sketched = q @ (sum(x @ a for x in b) / 5).T.matmul(q).T
    assert torch.allclose(sketched, (sum(b) / 5) @ a, atol=1e-12)


@pytest.mark.parametrize("target", ["query", "attn.c_attn", "attn.c_proj"])  # GPT-2 keeps weights transposed; the last is square
def test_a_core_keeps_its_norm_between_the_base_weights_singular_vectors(raw_config: Raw, target: str):
    if target == "query":
        bench, _ = bench_of(raw_config, "fedsb")
        peft_model = bench.model.module.backbone
    else:
        from transformers import GPT2Config, GPT2Model

        from dp_federated_lora.lora import Task, adapt

        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(0)
            backbone = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)).requires_grad_(False)
        model = adapt(
            backbone,
            task=Task.CLASSIFICATION,
            classes=2,
            rank=2,
            alpha=2.0,
            targets=[target],
            last_layers=None,
            seed=0,
            cores=True,
        )
        peft_model = model.module.backbone
    layer = next(module for name, module in peft_model.named_modules() if name.endswith(target) and hasattr(module, "lora_B"))
    core, basis = layer.lora_B["default"]
    a, b = layer.lora_A["default"].weight.detach().double(), basis.weight.detach().double()
    assert not core.weight.any()
    x = normal(2, 2, seed=0)
    assert float((b @ x @ a).norm()) == pytest.approx(float(x.norm()), rel=1e-6)
    base = layer.get_base_layer().weight.double()
    base = base if target == "query" else base.T
    assert torch.allclose(b.T @ base @ a.T, torch.linalg.svdvals(base)[:2].diag(), atol=1e-5)


@pytest.mark.parametrize(
    ("unit", "method"), [*(("example", m) for m in sorted(LINEAR)), *(("client", m) for m in sorted(METHODS))]
)
def test_every_method_trains_and_its_adapter_computes_the_same_for_whoever_loads_it(
    request: pytest.FixtureRequest, tiny_model: Path, method: str, unit: str
):
    from transformers import AutoModel

    raw: Raw = request.getfixturevalue("raw_config" if unit == "example" else "client_config")
    named(raw, method)
    refusals = {"lalora": "rolora", "fedpower": "rolora", "fedsa": "without noise"}
    if unit == "example" and method in refusals:
        with pytest.raises(Exception, match=refusals[method]):
            parse_config(raw, where="test")
        return
    raw["training"]["head_rounds"] = 1
    raw["run"]["insecure_seed"] = 1  # how finely float32 resolves merged weights depends on how large the noise makes them
    result = train(parse_config(raw, where="test"))
    assert result.rounds == raw["privacy"]["rounds"]
    assert evaluate(result.path) == result.metrics
    saved = load_file(result.path / "adapter" / "adapter_model.safetensors")
    assert {Factor.of(name) for name in saved} == {A, B}
    assert all(tensor.any() == (Factor.of(name) not in METHODS[method].kept) for name, tensor in saved.items())
    ranks = {len(tensor) for name, tensor in saved.items() if Factor.of(name) is A}
    merged = {"flora": 4 * 2, "fedex": 3 * 2}.get(method, 0) * (result.rounds - 1)  # components of four participants of rank 2
    assert all(2 + min(merged, 1) <= rank <= 2 + merged for rank in ranks)
    plain = with_peft(AutoModel.from_pretrained(tiny_model), result.path / "adapter")
    bench = Workbench.of(parse_config(raw, where="test"))
    bench.model.load_saved(result.path / "adapter")
    ids, mask = torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        base = AutoModel.from_pretrained(tiny_model)(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = bench.model.module.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        theirs = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(base, theirs, atol=1e-3) == bool(METHODS[method].kept)  # a B that stays with clients leaves none


def test_optimiser_state_of_what_is_not_sent_stays_as_it_is(raw_config: Raw):
    from dp_federated_lora.federated import Server
    from dp_federated_lora.lab.plans import privacy_plan

    bench, _ = bench_of(raw_config, "rolora")
    server, state = Server.of(bench.model, privacy_plan(bench.config), bench.method, Adam(0.1))
    first, second = (set(server.positions_in(n).tolist()) for n in (1, 2))
    assert first | second == set(range(server.layout.size))
    head = {p for name, _, part in server.layout.slices() if Factor.of(name) is HEAD for p in range(part.start, part.stop)}
    assert first & second == head


def test_bytes_count_what_goes_down_and_up(client_config: Raw):
    from dp_federated_lora.federated import Server
    from dp_federated_lora.lab.plans import privacy_plan

    # Rank 2 on query and value of the last two of three blocks of width 32; a head of three classes.
    head, factor = 3 * 32 + 3, 4 * 2 * 32
    expected = {"fedavg": 2 * (head + 2 * factor), "ffa": 2 * (head + factor), "fedask": 2 * (head + factor) + factor}
    expected |= {"fedpower": 2 * head + 3 * factor, "rolora": 2 * (head + factor), "fedsb": 2 * (head + 4 * 4)}
    expected |= dict.fromkeys(("flexlora", "hetlora"), expected["fedavg"])
    expected |= dict.fromkeys(("flora", "fedex"), expected["fedavg"] + 4 * 32 * 32)  # down: what went into the frozen weights
    for method, scalars in expected.items():
        bench, _ = bench_of(client_config, method)
        server, _ = Server.of(bench.model, privacy_plan(bench.config), bench.method, Adam(0.1))
        assert server.bytes_per_client(1) == 4 * scalars


def test_fedprox_pulls_towards_the_global_adapter_and_adamw_takes_its_own_steps(raw_config: Raw):
    bench, examples = bench_of(raw_config, "ffa")
    start = bench.model.state()
    trained = bench.model.train_only(bench.method.factors)

    def update(**changes: object) -> torch.Tensor:
        bench.model.load(start)
        local = replace(LocalSteps(steps=3, batch_size=10**6, learning_rate=0.5), **changes)
        return local_update(bench.learner, trained, examples, local, torch.Generator().manual_seed(0))

    plain, pulled = update(), update(proximal=0.5)
    assert float(pulled.norm()) < float(plain.norm())
    assert torch.equal(update(steps=1, proximal=0.5), update(steps=1))  # the first step is taken at the global adapter
    assert torch.equal(update(proximal=0.0), plain)
    # After one step of AdamW every coordinate with a gradient has moved by the learning rate.
    moved = update(steps=1, optimizer="adamw", learning_rate=0.01)
    assert moved.any() and torch.allclose(moved[moved != 0].abs(), torch.tensor(0.01), rtol=1e-2)
