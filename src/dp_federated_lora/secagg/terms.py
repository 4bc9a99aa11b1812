"""What everybody agrees on before a secure sum, and what follows: context, neighbours, threshold, limits of messages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from dp_federated_lora.errors import IncompatiblePlan, SecureSumAborted
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg.crypto import PrivateKey, add_mask, agree

_PER_NEIGHBOUR: Final = 1024
"""Bytes of a message for each client that it names, at most: a name, keys, a signature or sealed shares."""


@final
@dataclass(frozen=True)
class Terms:
    """Public facts of one secure sum.

    Args:
        run: name of the run, unique among all that these clients take part in.
        number: of the round; a client takes part in one sum of a run and number.
        size: integers of a contribution.
        bits: b; sums are modulo 2^b, at most 32.
        roster: public keys (Ed25519, hexadecimal) of all who may take part, by name, known from elsewhere than the server.
        model: SHA-256 of what the clients were sent to compute with. Clients that were sent different things share no masks.
        min_cohort: fewest clients whose sum is opened.
        corrupt: clients of a neighbourhood, its own client included, that may act with the server.
        degree: neighbours of each client; None for everybody, which up to 100 clients costs little.

    Raises:
        IncompatiblePlan: if a field is out of range.
    """

    run: str
    number: int
    size: int
    bits: int
    roster: Mapping[str, str]
    model: bytes
    min_cohort: int
    corrupt: int = 0
    degree: int | None = None

    def __post_init__(self) -> None:
        if not (self.size >= 1 and 1 <= self.bits <= 32 and len(self.model) == 32):
            raise IncompatiblePlan(f"a secure sum has size >= 1, 1 to 32 bits, a SHA-256; got {self.size}, {self.bits}")
        if not 2 <= self.min_cohort <= len(self.roster) or not 0 <= self.corrupt < self.min_cohort - 1:
            raise IncompatiblePlan(
                f"min_cohort {self.min_cohort} of a roster of {len(self.roster)} with {self.corrupt} corrupt: the sum must be "
                "of two honest clients at least, since one alone is not hidden"
            )
        if self.degree is not None and (self.degree < 2 or self.degree % 2):
            raise IncompatiblePlan(f"degree {self.degree}: neighbours sit on both sides, so it is even and at least 2")

    @cached_property
    def context(self) -> bytes:
        """SHA-256 of all of it; in every key, signature and message."""
        facts = (
            "dpfl secure sum 1",
            self.run,
            self.number,
            self.size,
            self.bits,
            sorted(self.roster.items()),
            self.model,
            self.min_cohort,
            self.corrupt,
            self.degree,
        )
        return hashlib.sha256(msgspec.msgpack.encode(facts)).digest()

    def neighbours(self, name: str, cohort: Sequence[str]) -> list[str]:
        """With whom `name` shares masks and secrets: the next on both sides of a circle drawn from context and cohort.

        (Bell et al. 2020, CCS.) Everybody, where there are no more than `degree` others.
        """
        others = [other for other in cohort if other != name]
        if self.degree is None or len(others) <= self.degree:
            return others
        circle = self._circle(cohort)
        place = circle.index(name)
        steps = range(1, self.degree // 2 + 1)
        return sorted({circle[(place + side * step) % len(circle)] for step in steps for side in (1, -1)})

    def _circle(self, cohort: Sequence[str]) -> list[str]:
        seed = hashlib.sha256(self.context + msgspec.msgpack.encode(list(cohort))).digest()
        order = np.argsort(SecureRandom(seed).uint64(len(cohort)), kind="stable")
        return [cohort[index] for index in order]

    def threshold(self, neighbourhood: int) -> int:
        """Shares that open a secret, of a client's neighbours and its own.

        More than half, and so many that two sets of them have more than `corrupt` in common: an honest client in both signs one
        list of survivors only.
        """
        return (neighbourhood + self.corrupt) // 2 + 1

    @property
    def item_bytes(self) -> int:
        """Bytes of one masked integer."""
        return -(-self.bits // 8)

    def pack(self, integers: NDArray[np.uint32]) -> bytes:
        """Integers `(size,)` modulo 2^b, little-endian."""
        reduced = (integers & np.uint32((1 << self.bits) - 1)).astype("<u4").view(np.uint8).reshape(-1, 4)
        packed = np.empty((self.size, self.item_bytes), dtype=np.uint8)
        for number in range(self.item_bytes):  # by columns: numpy copies rows of three bytes one by one
            packed[:, number] = reduced[:, number]
        return packed.tobytes()

    def unpack(self, packed: bytes) -> NDArray[np.uint32]:
        """What was packed.

        Raises:
            SecureSumAborted: if it has another size.
        """
        if len(packed) != self.size * self.item_bytes:
            raise SecureSumAborted(f"{len(packed)} bytes where {self.size} integers of {self.item_bytes} bytes are due")
        # Four bytes are read where each integer begins; the modulus takes off those of the next one.
        whole = np.ndarray((self.size,), dtype="<u4", buffer=packed + bytes(4), strides=(self.item_bytes,))
        return whole & np.uint32((1 << self.bits) - 1)

    def add_common_mask(self, total: NDArray[np.uint32], private: PrivateKey, public: bytes, *, adds: bool) -> None:
        """Put on `total` `(size,)`, modulo 2^32, what two clients have in common: the first adds it, the other takes it away."""
        add_mask(total, agree(private, public, "secure sum mask", self.context), adds=adds)

    @property
    def limit(self) -> int:
        """Most bytes of a message."""
        return _PER_NEIGHBOUR * (len(self.roster) + 1) + self.size * self.item_bytes


def degree_for(clients: int, *, corrupt: float, dropped: float, sigma: int = 40, eta: int = 30) -> tuple[int, int]:
    """The least even number of neighbours, and the threshold among them, such that three things fail with small probability.

    Union bounds over clients of hypergeometric tails (Bell et al. 2020): that a client has so many corrupt neighbours that they
    open its secrets, or none that is honest and stays (2^-sigma each); that too few neighbours stay to open them (2^-eta).

    Args:
        clients: of the cohort.
        corrupt: share of clients that act with the server, at most.
        dropped: share that drops out, at most.
        sigma: bits of security.
        eta: bits of correctness.

    Raises:
        IncompatiblePlan: if no number of neighbours does: everybody has to be one.
    """
    others, bad, gone = clients - 1, int(np.ceil(corrupt * clients)), int(np.ceil(dropped * clients))
    for degree in range(2, others + 1, 2):
        isolated = hypergeom.logpmf(degree, others, min(bad + gone, others), degree)
        if isolated + np.log(clients) > -sigma * np.log(2.0):
            continue
        thresholds = np.arange(1, degree + 1)
        opened = hypergeom.logsf(thresholds - 1, others, bad, degree) + np.log(clients) < -sigma * np.log(2.0)
        lost = hypergeom.logcdf(thresholds - 1, others, others - gone, degree) + np.log(clients) < -eta * np.log(2.0)
        if (opened & lost).any():
            return degree, int(thresholds[opened & lost][0])
    raise IncompatiblePlan(f"{clients} clients, {corrupt:.0%} corrupt and {dropped:.0%} dropped: everybody has to be a neighbour")


@lru_cache(maxsize=64)
def circle_for(clients: int, *, corrupt: int, dropped: int, sigma: int = 40, eta: int = 30) -> tuple[int | None, int]:
    """The least even number of neighbours, and how many of a neighbourhood may be corrupt, for `Terms` of that many clients.

    Union bounds over clients of hypergeometric tails: that a neighbourhood has more corrupt clients than that (2^-sigma), that no
    neighbour is honest and stays (2^-sigma), and that fewer stay than the threshold of `Terms` (2^-eta). The threshold is larger
    than that of `degree_for`, as neighbours also sign one list of survivors.

    Args:
        clients: of the cohort.
        corrupt: clients that act with the server, at most.
        dropped: clients that drop out, at most.
        sigma: bits of security.
        eta: bits of correctness.

    Returns:
        `degree` and `corrupt` of `Terms`; (None, corrupt), everybody a neighbour, where no circle does.
    """
    others, secure, correct = clients - 1, sigma * np.log(2.0) + np.log(clients), eta * np.log(2.0) + np.log(clients)
    for degree in range(2, others, 2):
        if hypergeom.logpmf(degree, others, min(corrupt + dropped, others), degree) > -secure:
            continue
        near = np.arange(degree + 1)
        within = np.flatnonzero(hypergeom.logsf(near - 1, others, corrupt, degree) < -secure)  # a client itself counts, too
        if not within.size:
            continue
        bad = int(within[0])
        threshold = (degree + 1 + bad) // 2 + 1
        if hypergeom.logcdf(threshold - 2, others, others - dropped, degree) < -correct:  # of neighbours beside oneself
            return degree, bad
    return None, corrupt
