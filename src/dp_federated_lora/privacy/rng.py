"""The one bit stream behind cohorts and noise, and the exact samplers on it.

The stream is the AES-256-CTR keystream of a 256-bit key. Keys come from the operating system; a seed is
accepted only through `SecureRandom.insecure`, and everything drawn from such a stream is marked so that no
statement can call it private. There is no fallback: if the operating system gives no entropy, this raises.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import ClassVar, Final, NoReturn, Self, final

import mpmath
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy.special import ndtri

from dp_federated_lora.errors import InsecureRandomness, PrivacyError

_INSECURE_LABEL: Final = b"dpfl insecure seed "

# rounded_gaussian: below this tail probability, or this close (in standard deviations) to a rounding boundary,
# float64 does not decide the cell and the draw is finished in multiple precision. ndtri is accurate to a few
# units in 1e-15 there (tests compare it with mpmath), a hundredth of the margin, and the half cell of a 64-bit tail
# probability is 2^-47 wide at most. A wider margin costs time: one draw in multiple precision takes a millisecond.
_TAIL: Final = 2.0**-20
_MARGIN: Final = 2.0**-42
_BLOCK: Final = 2**14  # draws whose temporaries stay in the cache


@final
class SecureRandom:
    """A keyed, domain-separated random stream; the same key and labels give the same draws.

    Args:
        key: 32 bytes.
        insecure: the key was derived from a seed; nothing drawn from it is private.
    """

    __slots__ = ("_encryptor", "_key", "insecure")
    KEY_BYTES: ClassVar[int] = 32

    def __init__(self, key: bytes, *, insecure: bool = False) -> None:
        if len(key) != SecureRandom.KEY_BYTES:
            raise InsecureRandomness(f"a stream key has {SecureRandom.KEY_BYTES} bytes, got {len(key)}")
        self._key = key
        self.insecure = insecure
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_os(cls) -> Self:
        """A stream with a fresh key from the operating system's entropy."""
        return cls(os.urandom(SecureRandom.KEY_BYTES))

    @classmethod
    def insecure_from(cls, seed: int) -> Self:
        """A reproducible stream for tests and `--insecure-seed`; its draws are NOT private."""
        return cls(hashlib.sha256(_INSECURE_LABEL + str(seed).encode()).digest(), insecure=True)

    def derive(self, *labels: str | int) -> SecureRandom:
        """An independent stream for a purpose (HKDF-SHA256, RFC 5869, labels in the info field)."""
        info = "\x1f".join(f"{type(label).__name__}:{label}" for label in labels).encode()
        key = HKDF(algorithm=SHA256(), length=SecureRandom.KEY_BYTES, salt=None, info=info).derive(self._key)
        return SecureRandom(key, insecure=self.insecure)

    @property
    def commitment(self) -> str:
        """SHA-256 of the key, hexadecimal: names the stream without revealing a draw."""
        return hashlib.sha256(b"dpfl key commitment" + self._key).hexdigest()

    def export_key(self) -> bytes:
        """The key, for the round's key file; whoever holds it can subtract the noise."""
        return self._key

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """`n` uniform 64-bit integers `(n,)`."""
        return np.frombuffer(self._encryptor.update(bytes(8 * n)), dtype=np.uint64)

    def bernoulli(self, p: float, n: int) -> NDArray[np.bool_]:
        """`n` independent coins `(n,)` that are true with probability floor(p 2^64) / 2^64 <= p.

        Raises:
            PrivacyError: if p is outside [0, 1].
        """
        if not 0.0 <= p <= 1.0:
            raise PrivacyError(f"a sampling probability lies in [0, 1], got {p}")
        if p == 1.0:
            return np.ones(n, dtype=np.bool_)
        return self.uint64(n) < np.uint64(math.floor(math.ldexp(p, 64)))

    def rounded_gaussian(self, sigma: float, n: int, *, offset: NDArray[np.float64] | float = 0.0) -> NDArray[np.int64]:
        r"""Exact draws `(n,)` int64 of round(offset + N(0, sigma^2)); P(k) = Phi((k+1/2)/sigma) - Phi((k-1/2)/sigma) at 0.

        A uniform of 64 bits is mapped through the inverse normal distribution; where those bits or float64 do not
        settle the integer, further bits and multiple precision do, so the result is the rounding of a true
        normal deviate and not of a floating-point one (cf. Mironov 2012 on floating-point noise).

        Args:
            sigma: standard deviation in lattice units, in (0, 2^40].
            n: number of draws.
            offset: in [-1/2, 1/2], one for all draws or `(n,)`; taken as exact.

        Raises:
            PrivacyError: if sigma or an offset is not in that range.
        """
        if not 0.0 < sigma <= 2.0**40:
            raise PrivacyError(f"noise scale must lie in (0, 2^40] lattice units, got {sigma}")
        offsets = np.broadcast_to(np.asarray(offset, dtype=np.float64), (n,))
        if not (np.abs(offsets) <= 0.5).all():
            raise PrivacyError("an offset lies within half a lattice unit; add whole units to the draw instead")
        result = np.empty(n, dtype=np.int64)
        for start in range(0, n, _BLOCK):
            self._fill_rounded_gaussian(sigma, offsets[start : start + _BLOCK], result[start : start + _BLOCK])
        return result

    def _fill_rounded_gaussian(self, sigma: float, offsets: NDArray[np.float64], result: NDArray[np.int64]) -> None:
        bits = self.uint64(len(result)).view(np.int64)
        sign = bits >> 63 | 1  # -1 or 1
        magnitude = bits & (2**63 - 1)
        tail = (magnitude + 0.5) * 2.0**-64  # in (0, 1/2]: mass beyond the deviate
        scaled: NDArray[np.float64] = ndtri(tail) * -sigma * sign + offsets
        rounded = np.rint(scaled)
        undecided = (tail < _TAIL) | (np.abs(scaled - rounded) > 0.5 - 1e-9 - _MARGIN * sigma)
        result[:] = rounded
        for index in np.flatnonzero(undecided):
            result[index] = self._decide(int(magnitude[index]), sigma, int(sign[index]), float(offsets[index]))

    def _decide(self, magnitude: int, sigma: float, sign: int = 1, offset: float = 0.0) -> int:
        """The cell of the deviate with tail mass in [magnitude, magnitude + 1) 2^-64 on the side of `sign`, refined as needed."""
        bits = 64
        while True:
            magnitude = (magnitude << 64) | int(self.uint64(1)[0])
            bits += 64
            with mpmath.workprec(2 * bits):
                low, high = (
                    offset + sign * sigma * mpmath.sqrt(2) * mpmath.erfinv(1 - mpmath.ldexp(m, 1 - bits)) if m else mpmath.inf
                    for m in (magnitude + 1, magnitude)
                )
                if high != mpmath.inf and mpmath.nint(low) == mpmath.nint(high):
                    return int(mpmath.nint(low))

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a random stream cannot be pickled or copied: its draws would repeat")
