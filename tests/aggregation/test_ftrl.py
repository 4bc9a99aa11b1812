"""Follow the regularised leader: its formula, where it is plain SGD and where it is not, and what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_federated_lora.aggregation import Ftrl, ServerOptimizer, Sgd
from dp_federated_lora.audit import Transcript
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.run import Run
from saved import adapter

Raw = dict[str, dict[str, object]]


def path(optimizer: ServerOptimizer, means: list[Tensor]) -> list[Tensor]:
    """x_t - x_0 after each of `means`."""
    state, x, reached = optimizer.init(len(means[0])), torch.zeros_like(means[0]), []
    for mean in means:
        step, state = optimizer.update(mean, state)
        x = x + step
        reached.append(x)
    return reached


def draws(seed: int, rounds: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(rounds)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_every_step_ends_at_the_regularised_leader(seed: int, rounds: int):
    means = draws(seed, rounds)
    for t, reached in enumerate(path(Ftrl(0.3), means), start=1):
        x = reached.clone().requires_grad_()
        objective = -torch.stack(means[:t]).sum(dim=0) @ x + t**0.5 / (2 * 0.3) * (x @ x)
        (slope,) = torch.autograd.grad(objective, x)
        assert torch.allclose(slope, torch.zeros(3, dtype=torch.float64), atol=1e-9)  # convex: the minimum


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.0, 0.95))
def test_with_a_constant_regulariser_it_would_be_heavy_ball_sgd(seed: int, momentum: float):
    """DP-FTRL with momentum as published: momentum on prefix sums, and the model anew from its start in every round."""
    means = draws(seed, 8)
    total, leader = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ours = path(Ftrl(0.1, momentum), means)
    for t, (mean, sgd) in enumerate(zip(means, path(Sgd(0.1, momentum), means), strict=True), start=1):
        total = total + mean
        leader = momentum * leader + total
        assert torch.allclose(sgd, 0.1 * leader, atol=1e-12)
        assert torch.allclose(ours[t - 1], 0.1 * leader / t**0.5, atol=1e-12)


@pytest.mark.parametrize(("momentum", "rounds", "moved"), [(0.0, 2, 0.2), (0.9, 2, 0.29), (0.0, 3, 0.3), (0.9, 3, 0.561)])
def test_dp_ftrl_of_its_authors_moves_as_far_as_sgd_does(momentum: float, rounds: int, moved: float):
    # The values of the tests that come with the paper's code (google-research, federated dp_ftrl): unit gradients, rate 0.1.
    means = [torch.ones(1, dtype=torch.float64)] * rounds
    assert path(Sgd(0.1, momentum), means)[-1].item() == pytest.approx(moved)
    assert path(Ftrl(0.1, momentum), means)[-1].item() == pytest.approx(moved / rounds**0.5)


def test_independent_noise_does_not_grow_as_it_does_in_sgd():
    generator = torch.Generator().manual_seed(1)
    means = [torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(25)]
    spread = [float(path(optimizer, means)[-1].std()) for optimizer in (Ftrl(1.0), Sgd(1.0))]
    assert spread[0] == pytest.approx(1.0, rel=0.03)  # 6 standard errors of a sample of 20,000: false positives under 1e-8
    assert spread[1] == pytest.approx(5.0, rel=0.03)


def test_a_coordinate_that_was_not_sent_keeps_its_own_count_of_steps():
    both, alone = Ftrl(1.0, 0.5), path(Ftrl(1.0, 0.5), [torch.ones(1, dtype=torch.float64)] * 2)
    state, x = both.init(2), torch.zeros(2, dtype=torch.float64)
    for sent in ([0, 1], [0], [0, 1]):
        step, part = both.update(torch.ones(len(sent), dtype=torch.float64), {n: t[sent] for n, t in state.items()})
        state = {n: t.index_copy(0, torch.tensor(sent), part[n]) for n, t in state.items()}
        x[sent] += step
    assert x[1].item() == pytest.approx(alone[-1].item())
    assert x[0].item() != pytest.approx(x[1].item())


def test_under_correlated_noise_the_adapter_is_a_scaled_sum_of_releases(client_config: Raw):
    client_config["privacy"] |= {"sampling_rate": 1.0, "rounds": 5, "correlated": {"bands": 2, "separation": 2}}
    client_config["training"] |= {"server_optimizer": "ftrl", "server_learning_rate": 0.3}
    config, releases = parse_config(client_config, where="test"), Transcript()
    with RunDirectory.create(Path(config.run.out), config) as directory:
        run = Run(directory, instrument=releases.wrap)
        run.train()
        run.write_results()
    total = torch.stack(releases.released).sum(dim=0)
    trained = {n: t for n, t in adapter(directory.path).items() if "lora_A" not in n}  # B and the head, which start at zero
    moved = torch.cat([tensor.flatten().double() for tensor in trained.values()])
    assert moved.numel() == total.numel()
    assert float(moved.norm()) == pytest.approx(0.3 * float(total.norm()) / 5**0.5, rel=1e-5)


def test_its_momentum_is_that_of_sgd_in_the_configuration_and_fedask_refuses_its_memory(raw_config: Raw):
    raw_config["training"] |= {"server_optimizer": "ftrl", "server_momentum": 0.9}
    assert parse_config(raw_config, where="test").training.server_momentum == 0.9
    raw_config["method"] = {"name": "fedask"}
    with pytest.raises(ConfigError, match="no memory of earlier steps fits"):
        parse_config(raw_config, where="test")
