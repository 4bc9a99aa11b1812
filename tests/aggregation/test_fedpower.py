"""FedPower: what is sent against dense matrices, and half-steps against the singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.aggregation import METHODS
from dp_federated_lora.aggregation.lora.fedpower import orthonormalised, projected, reconstructed_norm
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lora import Factor
from dp_federated_lora.privacy import UnitId, clip_to
from dp_federated_lora.vector import Layout

Raw = dict[str, dict[str, object]]
Tensors = dict[str, torch.Tensor]
LEFT, RIGHT = (frozenset((factor, Factor.HEAD)) for factor in (Factor.B, Factor.A))
M, N, R = 14, 11, 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_adapter(seed: int) -> Tensors:
    """Two layers with orthonormal rows in A, and a head."""
    layers = {f"{layer}.lora_A.w": torch.linalg.qr(normal(N, R, seed=seed + i)).Q.T for i, layer in enumerate("xy")}
    layers |= {f"{layer}.lora_B.w": normal(M, R, seed=seed + 10 + i) for i, layer in enumerate("xy")}
    return layers | {"head.weight": normal(2, 4, seed=seed + 20)}


def a_change(adapter: Tensors, seed: int) -> Tensors:
    return {name: normal(*tensor.shape, seed=seed + i) for i, (name, tensor) in enumerate(adapter.items())}


def product(adapter: Tensors, layer: str) -> torch.Tensor:
    return adapter[f"{layer}.lora_B.w"].double() @ adapter[f"{layer}.lora_A.w"].double()


def moved(adapter: Tensors, change: Tensors) -> Tensors:
    return {name: tensor + change[name] for name, tensor in adapter.items()}


def dense(adapter: Tensors, change: Tensors) -> Tensors:
    """The change of both products and of the head."""
    after = moved(adapter, change)
    return {layer: product(after, layer) - product(adapter, layer) for layer in "xy"} | {"head": change["head.weight"]}


def length(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e3]))
def test_the_norm_of_the_product_is_found_without_forming_it(seed: int, scale: float):
    adapter = an_adapter(seed)
    change = {name: scale * tensor for name, tensor in a_change(adapter, seed + 100).items()}
    assert float(reconstructed_norm(adapter, change)) == pytest.approx(length(dense(adapter, change)), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 100.0))
def test_what_is_sent_is_the_clipped_product_change_seen_from_the_kept_factor(seed: int, clip_norm: float):
    adapter = an_adapter(seed)
    change = a_change(adapter, seed + 100)
    full = dense(adapter, change)
    scale = min(1.0, clip_norm / length(full))
    sent = projected(adapter, change, LEFT, clip_norm)
    assert set(sent) == {"x.lora_B.w", "y.lora_B.w", "head.weight"}
    for layer in "xy":
        assert torch.allclose(sent[f"{layer}.lora_B.w"], scale * full[layer] @ adapter[f"{layer}.lora_A.w"].T, atol=1e-9)
    assert torch.allclose(sent["head.weight"], scale * full["head"])
    assert length(sent) <= min(clip_norm, scale * length(full)) * (1 + 1e-9)
    turned = {n: t.double() for n, t in orthonormalised(adapter, LEFT).items()}
    full, sent = dense(turned, change), projected(turned, change, RIGHT, 1e9)
    for layer in "xy":
        assert torch.allclose(sent[f"{layer}.lora_A.w"], turned[f"{layer}.lora_B.w"].T @ full[layer], atol=1e-9)


def test_the_sum_of_what_is_sent_is_what_the_sum_of_products_would_send():
    adapter = an_adapter(1)
    changes = [a_change(adapter, seed) for seed in (100, 200, 300)]
    total = sum(product(moved(adapter, change), "x") - product(adapter, "x") for change in changes)
    sent = sum(projected(adapter, change, LEFT, 1e9)["x.lora_B.w"] for change in changes)
    assert torch.allclose(sent, total @ adapter["x.lora_A.w"].T, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_change_that_is_not_finite_counts_as_nothing(bad: float):
    adapter = an_adapter(1)
    change = a_change(adapter, 100)
    change["x.lora_B.w"][0, 0] = bad
    sent = projected(adapter, change, LEFT, 1.0)
    row = clip_to(Layout.of(sent).flatten(sent), 1.0, UnitId("u"))
    assert not row._value.any()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([LEFT, RIGHT]), st.booleans())
def test_orthonormalising_keeps_products_and_starts_from_zero_too(seed: int, sent: frozenset[Factor], zero: bool):
    adapter = an_adapter(seed)
    if zero:
        adapter |= {name: torch.zeros_like(tensor) for name, tensor in adapter.items() if Factor.of(name) in sent}
    after = orthonormalised(adapter, sent)
    for layer in "xy":
        assert torch.allclose(product(after, layer), product(adapter, layer), atol=1e-5)
        basis = after[f"{layer}.lora_B.w"] if sent is LEFT else after[f"{layer}.lora_A.w"].T
        assert torch.allclose(basis.T @ basis, torch.eye(R), atol=1e-5)
    assert torch.equal(after["head.weight"], adapter["head.weight"])


def after_rounds(products: list[torch.Tensor], turns: int) -> torch.Tensor:
    """The server's product after noiseless rounds in which every client's local training ends at a product of its own."""
    adapter = {"x.lora_A.w": torch.linalg.qr(normal(N, R, seed=1)).Q.T, "x.lora_B.w": torch.zeros(M, R, dtype=torch.float64)}
    for number in range(1, turns + 1):
        sent = METHODS["fedpower"].factors_in(number)
        total: Tensors = {}
        for target in products:
            # Any factors of the client's product will do; these have the shapes of the adapter's.
            u, s, vt = torch.linalg.svd(target, full_matrices=False)
            ends = {"x.lora_B.w": u[:, :R] * s[:R], "x.lora_A.w": vt[:R]}
            change = {name: tensor - adapter[name].double() for name, tensor in ends.items()}
            for name, tensor in projected(adapter, change, sent, 1e9).items():
                total[name] = total.get(name, torch.zeros(())) + tensor / len(products)
        step = {name: adapter[name].double() + total.get(name, torch.zeros(())) for name in adapter}
        adapter = orthonormalised(step, sent)
    return product(adapter, "x")


def test_two_turns_recover_one_clients_product_and_more_the_best_approximation_of_the_mean():
    products = [normal(M, R, seed=k) @ normal(R, N, seed=10 + k) for k in range(3)]
    assert torch.allclose(after_rounds(products[:1], 2), products[0], atol=1e-4)
    u, s, vt = torch.linalg.svd(sum(products) / 3, full_matrices=False)
    best = u[:, :R] * s[:R] @ vt[:R]
    assert s[R] > 0.1 * s[0]  # the mean does not fit the rank
    errors = [float((after_rounds(products, turns) - best).norm() / best.norm()) for turns in (2, 10, 100)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_what_fedpower_cannot_do_is_refused(client_config: Raw):
    client_config["method"] = {"name": "fedpower"}
    parse_config(client_config, where="test")
    changes = ({"clip_quantile": 0.5}, {"correlated": {"bands": 2, "separation": 2}, "sampling_rate": 1.0})
    for change, reason in zip(changes, ("clip_quantile", "correlated"), strict=True):
        with pytest.raises(ConfigError, match=reason):
            parse_config(client_config | {"privacy": client_config["privacy"] | change}, where="test")
    ranks = client_config["federation"] | {"ranks": [{"rank": 2, "clients": 4}]}
    with pytest.raises(ConfigError, match=r"federation\.ranks"):
        parse_config(client_config | {"federation": ranks}, where="test")
    with pytest.raises(ConfigError, match="fedpower.*memory"):
        parse_config(client_config | {"training": client_config["training"] | {"server_momentum": 0.5}}, where="test")
    with pytest.raises(ConfigError, match="rolora"):
        parse_config(client_config | {"privacy": client_config["privacy"] | {"unit": "example", "population": 120}}, where="test")
