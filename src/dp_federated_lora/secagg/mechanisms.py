r"""Noise that clients add themselves: the lattice of a secure sum, its sensitivity, and what a release of the sum costs.

The distributed discrete Gaussian (Kairouz, Liu and Steinke 2021, arXiv 2102.06387) and Skellam (Agarwal, Kairouz and Liu
2021, arXiv 2110.04995) mechanisms. Every quantity of the guarantee is in lattice units, after rounding.

**Relation.** A client's contribution is replaced by zeros; its noise share stays. Only shares of honest clients that are
certain to be in the sum count: further shares are independent noise, hence post-processing, as is reduction modulo 2^b.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
import torch
from dp_accounting.rdp import compute_epsilon
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp, ndtri
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg.integer_noise import Law, discrete_gaussian, draw, skellam

_MAX_BITS: Final = 32
_DEVIATIONS: Final = -float(ndtri(0.5e-4))  # of a coordinate of the sum that must fit: it wraps with probability 1e-4
_FINEST_SHARE: Final = 2.0**15  # a larger standard deviation of one share gains nothing and is drawn more slowly
_LONGEST: Final = 2.0**30  # norm of a scaled contribution, so that squared norms fit 64 bits
_EXACT: Final = 2.0**31  # units of norm 2^22 lattice steps, times what a transform adds up, are integers below 2^53
_ORDERS: Final = np.arange(2.0, 513.0)  # the Skellam bound and sampling's binomial sum hold for integers


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSum:
    """Public facts of a sum of clients' integers modulo 2^bits, and the lattice that follows from them.

    Args:
        size: number of coordinates of a contribution.
        clip_norm: c, its L2 bound before rounding.
        noise_multiplier: z, standard deviation of the noise that is certain to be in the sum, over c.
        bits: b; a sum is known modulo 2^b.
        max_cohort: the most clients that a sum can have; sizes the lattice.
        min_cohort: the fewest with which a sum is opened; sizes the noise shares.
        colluders: clients of a cohort that may tell the adversary their noise share, or add none.
        units: where a client's vector is a sum over units of norm c each, the most that a whole sum has; None where it is one.

    Raises:
        IncompatiblePlan: if a field is out of range or the sum of `max_cohort` clients does not fit 2^bits.
    """

    size: int
    clip_norm: float
    noise_multiplier: float
    bits: int
    max_cohort: int
    min_cohort: int
    colluders: int = 0
    units: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("clip_norm", self.clip_norm), ("noise_multiplier", self.noise_multiplier)):
            if not (math.isfinite(value) and value > 0):
                raise IncompatiblePlan(f"{name} of a secure sum must be positive and finite, got {value}")
        if not 0 <= self.colluders < self.min_cohort <= self.max_cohort:
            raise IncompatiblePlan(
                f"{self.colluders} colluders, min_cohort {self.min_cohort}, max_cohort {self.max_cohort}: an honest client must "
                "be certain to be in the sum, so 0 <= colluders < min_cohort <= max_cohort"
            )
        if not self.max_cohort * _DEVIATIONS**2 < 4**self.bits <= 4**_MAX_BITS:
            raise IncompatiblePlan(
                f"{self.bits} bits must hold a sum of {self.max_cohort} rounded vectors and be at most {_MAX_BITS}: change bits"
            )
        if (self.units or 1) * math.sqrt(self.padded_size) >= _EXACT:
            raise IncompatiblePlan(f"a sum over {self.units} units in {self.padded_size} dimensions is not exact in float64")

    @property
    def padded_size(self) -> int:
        """d, the power of two that the rotation works on."""
        return 1 << (self.size - 1).bit_length()

    @property
    def shares(self) -> int:
        """Honest noise shares that are certain to be in the sum."""
        return self.min_cohort - self.colluders

    @property
    def scale(self) -> float:
        """s, lattice points per unit: as fine as coordinates of the largest sum fit 2^bits.

        The variance of a rotated coordinate is c^2 u^2 / d from contributions of u units, n (z c)^2 / shares from noise and at
        most n / 4 from rounding.
        """
        n, noise = self.max_cohort, self.noise_multiplier**2 / self.shares
        room = math.sqrt(4**self.bits - n * _DEVIATIONS**2) / (2.0 * _DEVIATIONS)
        fits = room / math.sqrt((self.units or n) ** 2 / self.padded_size + n * noise)
        return min(fits, _FINEST_SHARE / math.sqrt(noise), _LONGEST) / self.clip_norm

    @property
    def share_std(self) -> float:
        """Standard deviation of one client's noise share, lattice units."""
        return self.scale * self.clip_norm * self.noise_multiplier / math.sqrt(self.shares)

    @property
    def squared_bound(self) -> int:
        """Most that the squared L2 norm of a rounded contribution may be, lattice units.

        Stochastic rounding of a vector of norm s c meets it with probability 1 - beta at least, beta = exp(-1/2). A sum over
        units is rounded to the nearest integers: one unit more moves a coordinate by its own part and one step, and a little
        for float64's rounding of products below 2^43.
        """
        norm, root = self.scale * self.clip_norm, math.sqrt(self.padded_size)
        if self.units is not None:
            return math.floor((norm + root * (1.0 + 2.0**-8)) ** 2)
        return math.floor(min((norm + root) ** 2, norm**2 + root**2 / 4.0 + norm + root / 2.0))

    @property
    def l2(self) -> float:
        """L2 sensitivity of the integer sum."""
        return math.sqrt(self.squared_bound)

    @property
    def l1(self) -> float:
        """L1 sensitivity of the integer sum: L1 <= min(sqrt(d) L2, L2^2) for integers."""
        return self.l2 * min(math.sqrt(self.padded_size), self.l2)


@dataclass(frozen=True, slots=True)
class DistributedMechanism(ABC):
    """Noise in shares, one from each client of the secure sum `total`."""

    name: ClassVar[str]
    law: ClassVar[Law]
    total: SecureSum

    def noise_share(self, rng: SecureRandom) -> Tensor:
        """One client's exact noise `(d,)` int64, d the padded size; `rng` is the client's secret stream of this round."""
        return torch.from_numpy(draw(type(self).law, self.total.share_std, self.total.padded_size, rng.derive("noise")))

    @abstractmethod
    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """Renyi divergence bound of one release at integer `orders` above 1, same shape."""

    def epsilon(self, *, rounds: int, delta: float, sampling_rate: float = 1.0) -> float:
        """Epsilon of `rounds` releases at `delta` by RDP (conversion: Canonne, Kamath and Steinke 2020, proposition 12).

        Args:
            rounds: number of releases.
            delta: at which it holds.
            sampling_rate: q; below 1 only against an adversary that does not learn who took part (the server does), and
                where who adds noise does not depend on the unit.

        Raises:
            PrivacyError: if an argument is out of range.
        """
        if not (rounds >= 1 and 0.0 < delta < 1.0 and 0.0 < sampling_rate <= 1.0):
            raise PrivacyError(f"need rounds >= 1, 0 < delta < 1, 0 < q <= 1; got {rounds}, {delta}, {sampling_rate}")
        curve = self.rdp(_ORDERS) if sampling_rate == 1.0 else subsampled_rdp(self.rdp(_ORDERS), sampling_rate)
        return float(compute_epsilon(_ORDERS, rounds * curve, delta)[0])


@final
@dataclass(frozen=True, slots=True)
class DiscreteGaussian(DistributedMechanism):
    """Shares of discrete Gaussian noise; a sum of them is close to discrete Gaussian, and the distance is charged."""

    name: ClassVar[str] = "discrete Gaussian"
    law: ClassVar[Law] = discrete_gaussian

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """The least of three bounds (2102.06387); tau is the distance of a sum of shares from a discrete Gaussian."""
        size, share, root = self.total.padded_size, self.total.share_std, math.sqrt(self.total.padded_size)
        j = np.arange(1.0, self.total.shares)
        tau = 10.0 * float(np.exp(-2.0 * (math.pi * share) ** 2 * j / (j + 1.0)).sum())
        std = share * math.sqrt(self.total.shares)
        l2, l1 = self.total.l2 / std, self.total.l1 / std
        joint = min(l2**2 + 2.0 * l1 * tau + tau**2 * size, (l2 + root * tau) ** 2)
        return np.minimum(orders / 2.0 * l2**2 + tau * size, orders / 2.0 * joint)


@final
@dataclass(frozen=True, slots=True)
class Skellam(DistributedMechanism):
    """Shares of Skellam noise, whose sums are Skellam again."""

    name: ClassVar[str] = "Skellam"
    law: ClassVar[Law] = skellam

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """The bound at the variance of all shares."""
        return skellam_rdp(orders, l2=self.total.l2, l1=self.total.l1, variance=self.total.shares * self.total.share_std**2)


def skellam_rdp(orders: NDArray[np.float64], *, l2: float, l1: float, variance: float) -> NDArray[np.float64]:
    """RDP of Skellam noise of `variance` on integers of sensitivities l2 and l1 (2110.04995), at integer orders above 1."""
    fine = ((2.0 * orders - 1.0) * l2**2 + 6.0 * l1) / (4.0 * variance**2)
    return orders * l2**2 / (2.0 * variance) + np.minimum(fine, 3.0 * l1 / (2.0 * variance))


def subsampled_rdp(curve: NDArray[np.float64], sampling_rate: float) -> NDArray[np.float64]:
    r"""RDP at orders 2, 3, .. of symmetric additive noise with that `curve`, on a Poisson sample of rate q < 1.

    With P, Q the output with and without the unit, r = P/Q and M = (1-q) Q + q P, binomial expansion gives
    E_Q[(M/Q)^a] = sum_j C(a, j) (1-q)^(a-j) q^j E_Q[r^j]. The other direction is smaller for any noise that is symmetric about
    a point, for then E_Q[g(r)] = E_Q[r g(1/r)], and sqrt(u) sinh(k log u) >= r sqrt(v) sinh(-k log v) for r > 1, k >= 1/2,
    u = 1-q+qr, v = 1-q+q/r, with equality at k = 1/2 (Mironov, Talwar and Zhang 2019, arXiv 1908.10530; without symmetry
    Zhu and Wang 2019 lose a factor of 3).
    """
    orders = np.arange(2.0, len(curve) + 2.0)
    a, j = orders[:, None], orders[None, :]
    keep, take = math.log1p(-sampling_rate), math.log(sampling_rate)
    choose = gammaln(a + 1.0) - gammaln(j + 1.0) - gammaln(np.maximum(a - j, 0.0) + 1.0)
    terms = np.where(j <= a, choose + (a - j) * keep + j * take + (j - 1.0) * curve, -np.inf)
    first = (orders - 1.0) * keep + np.log1p((orders - 1.0) * sampling_rate)  # j = 0 and 1
    return np.asarray(logsumexp(np.column_stack((first, terms)), axis=1) / (orders - 1.0), dtype=np.float64)
