"""The Renyi filter against a second implementation and against the accountants it may never undercut."""

import math

import mpmath
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, NoOpDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.errors import UnsupportedEvent
from dp_federated_lora.privacy import (
    Composition,
    DpEvent,
    FixedSizeSampler,
    GaussianMechanism,
    PoissonSampler,
    RenyiFilter,
    TruncatedPoissonSampler,
    epsilon_rdp,
)

DELTA = 1e-5


def event(q: float, z: float) -> DpEvent:
    return PoissonSampler(q).amplify(GaussianMechanism(z).event)


def after(order: int, charged: DpEvent, count: int) -> RenyiFilter:
    total = RenyiFilter(order)
    for _ in range(count):
        total = total.with_event(charged)
    return total


def divergence(q: float, z: float, order: int) -> mpmath.mpf:
    """Mironov, Talwar and Zhang 2019, section 3.3, by the definition: a moment of a binomial mixture."""
    with mpmath.workdps(60):
        terms = (
            mpmath.binomial(order, k)
            * mpmath.mpf(q) ** k
            * mpmath.mpf(1 - q) ** (order - k)
            * mpmath.exp(k * (k - 1) / (2 * z * z))
            for k in range(order + 1)
        )
        return mpmath.log(mpmath.fsum(terms)) / (order - 1)


@pytest.mark.parametrize(("q", "z", "order"), [(0.01, 1.0, 8), (0.1, 2.0, 4), (0.2, 0.9, 16), (1.0, 3.0, 5), (0.05, 1.0, 64)])
def test_one_release_costs_the_divergence_of_its_definition(q: float, z: float, order: int):
    assert after(order, event(q, z), 1).divergence == pytest.approx(float(divergence(q, z, order)), rel=1e-9)


def test_epsilon_is_the_divergence_and_the_conversion_of_canonne_kamath_steinke():
    spent = after(6, event(1.0, 4.0), 3)
    by_hand = 3 * 6 / (2 * 16) + math.log((6 - 1) / 6) - (math.log(DELTA) + math.log(6)) / (6 - 1)
    assert spent.epsilon(DELTA) == pytest.approx(by_hand, rel=1e-12)
    assert RenyiFilter(6).epsilon(DELTA) == 0.0


def test_at_its_best_order_the_filter_is_the_rdp_accountant_of_the_literature():
    best = min(after(order, event(0.01, 1.0), 1000).epsilon(DELTA) for order in range(2, 64))
    literature = epsilon_rdp([(event(0.01, 1.0), 1000)], DELTA)
    assert literature == pytest.approx(2.1014, abs=1e-4)  # over fractional orders too
    assert literature <= best <= literature * 1.005


@pytest.mark.parametrize(("epsilon", "order"), [(0.1, 125), (1.0, 18), (3.0, 8), (8.0, 4), (30.0, 2)])
def test_the_order_admits_the_most_gaussian_releases_of_all_orders(epsilon: float, order: int):
    def admitted(alpha: int) -> int:
        """How many releases of z = 100 fit, in exact arithmetic: floor of budget over alpha / (2 z^2)."""
        conversion = mpmath.log1p(mpmath.mpf(-1) / alpha) - mpmath.log(DELTA * alpha) / (alpha - 1)
        return max(0, int(mpmath.floor((epsilon - conversion) * 2 * 100**2 / alpha)))

    chosen = RenyiFilter.for_budget(epsilon, DELTA)
    assert chosen.order == order
    assert admitted(order) == max(admitted(alpha) for alpha in range(2, 400))
    count = min(admitted(order), 300)
    assert chosen.with_event(event(1.0, 100 / math.sqrt(count))).epsilon(DELTA) <= epsilon


@settings(max_examples=25, deadline=None)
@given(
    q=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    z=st.floats(0.8, 5.0).map(lambda x: round(x, 1)),
    count=st.integers(1, 20),
    order=st.integers(2, 40),
)
def test_the_filter_never_shows_less_than_the_tight_accountant_nor_shrinks(q: float, z: float, count: int, order: int):
    total = after(order, event(q, z), count)
    tight = Composition()
    tight.add(event(q, z), count)
    # The discretised PLD is itself an upper bound, about 1e-3 a release above the truth.
    assert total.epsilon(DELTA) >= tight.epsilon(DELTA) - 2e-3 * count
    assert total.divergence > after(order, event(q, z), count - 1).divergence
    assert total.divergence >= count * after(order, event(q, z), 1).divergence * (1 - 1e-15)


def test_unknown_events_are_refused():
    with pytest.raises(UnsupportedEvent):
        RenyiFilter(4).with_event(LaplaceDpEvent(1.0))
    for bad in (GaussianDpEvent(0.0), SelfComposedDpEvent(GaussianDpEvent(1.0), 0), SelfComposedDpEvent(NoOpDpEvent(), -1)):
        with pytest.raises(UnsupportedEvent):
            RenyiFilter(4).with_event(bad)


@pytest.mark.parametrize(
    "sampler", [FixedSizeSampler(10, 100), TruncatedPoissonSampler(0.1, 20, 100)], ids=["replace-one", "PLD alone"]
)
def test_samples_without_a_renyi_bound_under_add_or_remove_one_are_refused(sampler: FixedSizeSampler | TruncatedPoissonSampler):
    charged = sampler.amplify(GaussianMechanism(2.0).event)
    for each in (charged, SelfComposedDpEvent(charged, 3)):
        with pytest.raises(UnsupportedEvent, match=r"lifetime budget.*nothing was charged"):
            RenyiFilter(4).with_event(each)


def test_nothing_costs_nothing_and_a_repeated_event_as_much_as_its_repetitions():
    total = after(8, event(0.1, 2.0), 3)
    assert total.with_event(NoOpDpEvent()) == total.with_event(SelfComposedDpEvent(NoOpDpEvent(), 5)) == total
    for charged in (event(0.1, 2.0), event(1.0, 3.0)):
        repeated, singly = total.with_event(SelfComposedDpEvent(charged, 50)), total
        for _ in range(50):
            singly = singly.with_event(charged)
        assert repeated.divergence == pytest.approx(singly.divergence, rel=1e-13)
        assert repeated.divergence >= total.divergence + 50 * after(8, charged, 1).divergence * (1 - 1e-15)
