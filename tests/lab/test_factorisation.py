"""Reference numbers are those of jax-privacy 2.0.0 with 64-bit floats, obtained by the calls that are named."""

from __future__ import annotations

import numpy as np
import pytest

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.factorisation import (
    Error,
    optimise_bands,
    optimise_buffers,
    prefix_error,
    square_root_bands,
)
from dp_federated_lora.privacy import CorrelatedGaussian, Participation, inverse, sensitivity


def test_the_square_root_of_prefix_sums():
    assert square_root_bands(5).tolist() == [1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128]
    assert inverse(square_root_bands(5)).tolist() == pytest.approx([1.0, -1 / 2, -1 / 8, -1 / 16, -5 / 128])
    assert np.convolve(square_root_bands(50), square_root_bands(50))[:50] == pytest.approx(np.ones(50))


@pytest.mark.parametrize(("n", "squared"), [(128, 2.61010), (1024, 3.27255)])
def test_sensitivity_of_the_optimum_for_one_participation(n: int, squared: float):
    assert sensitivity(square_root_bands(n), Participation(1, 1)) ** 2 == pytest.approx(squared, abs=1e-5)


def test_prefix_error_is_that_of_the_dense_product():
    bands, n = np.array([1.0, 0.5, -0.2]), 9
    C = sum(np.diag(np.full(n - j, c), -j) for j, c in enumerate(bands))
    variances = np.square(np.tril(np.ones((n, n))) @ np.linalg.inv(C)).sum(axis=1)
    assert prefix_error(bands, n) == pytest.approx(variances.mean(), rel=1e-12)
    assert prefix_error(bands, n, "max") == pytest.approx(variances.max(), rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "bands", "error", "loss", "second"),
    # c = toeplitz.optimize_banded_toeplitz(n, b, reduction_fn=jnp.mean | jnp.max); toeplitz.loss(c, n, reduction_fn); c[1] / c[0]
    [
        (64, 8, "mean", 7.09676191688255, 0.5877442616740394),
        (64, 8, "max", 11.72575368897956, 0.6339397917013635),
        (512, 16, "mean", 22.53189697772964, 0.628589160596535),
        (512, 16, "max", 40.212697675977154, 0.6682438520283853),
    ],
)
def test_optimal_bands_agree_with_a_second_implementation(rounds: int, bands: int, error: Error, loss: float, second: float):
    found = optimise_bands(rounds, bands, error)
    assert len(found.weights) == bands - 1
    column = found.column(rounds)
    assert prefix_error(column, rounds, error) * (column @ column) == pytest.approx(loss, rel=1e-9)
    assert found.weights[0] == pytest.approx(second, abs=1e-4)


def test_eight_bands_of_eight_participations_have_sensitivity_eight():
    column = optimise_bands(64, 8).column(64)
    assert sensitivity(column / np.linalg.norm(column), Participation(8, 8)) ** 2 == pytest.approx(8.0, abs=1e-9)


def test_more_bands_never_do_worse_and_one_band_is_independent_noise():
    columns = [optimise_bands(100, bands).column(100) for bands in (1, 2, 5, 20, 100)]
    errors = [prefix_error(column, 100) * (column @ column) for column in columns]
    assert errors[0] == pytest.approx(50.5)
    assert errors == sorted(errors, reverse=True)
    for bands in (0, 101):
        with pytest.raises(ConfigError, match="got"):
            optimise_bands(100, bands)


@pytest.mark.parametrize(
    ("rounds", "separation", "maximum", "buffers", "error", "loss"),
    # buffered_toeplitz.optimize_loss(LossFn.build_closed_form_single_participation(n) for one participation, else
    # LossFn.build_min_sep(n=, error=, min_sep=, max_participations=), num_buffers=)
    [
        (256, 1, 1, 1, "max", 9.590128180797077),
        (256, 1, 1, 2, "max", 8.111255324945267),
        (200, 20, 5, 1, "mean", 54.46339233031915),
        (200, 20, 5, 3, "mean", 53.640828229208786),
    ],
)
def test_buffers_agree_with_a_second_implementation(
    rounds: int, separation: int, maximum: int, buffers: int, error: Error, loss: float
):
    participation = Participation(separation, maximum)
    found = optimise_buffers(rounds, separation, maximum, buffers, error)
    assert len(found.decays) == buffers
    column = found.column(rounds)
    assert prefix_error(column, rounds, error) * sensitivity(column, participation) ** 2 == pytest.approx(loss, rel=1e-3)
    # Non-negative and never increasing, and slow enough for float64 with a model of any size that fits a server.
    CorrelatedGaussian(found, 1.0, 1.0, rounds, participation)._require_precision(10**7)


def test_the_jax_privacy_library_agrees_where_it_is_installed():
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")
    found = np.asarray(toeplitz.optimize_banded_toeplitz(64, 8))
    ours = optimise_bands(64, 8).column(64)
    assert prefix_error(ours / np.linalg.norm(ours), 64) == pytest.approx(
        prefix_error(found / np.linalg.norm(found), 64), rel=1e-4
    )
