"""The few primitives of secure sums, all from `cryptography` but Shamir's: key agreement, sealed shares, masks, shared secrets.

Every derived key names its purpose and the round's context (HKDF, RFC 5869), so that a key of one round or purpose is useless in
another.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from dp_federated_lora.errors import SecureSumAborted
from dp_federated_lora.privacy import SecureRandom

KEY_BYTES: Final = 32
SHARE_BYTES: Final = 33
PRIME: Final = 2**256 + 297
"""The smallest prime above all 32-byte secrets."""

_NONCE_BYTES: Final = 12
_BLOCK: Final = 2**15  # integers of a mask that stay in the cache between the cipher and the sum


PrivateKey = X25519PrivateKey
"""Of key agreement (RFC 7748)."""


def agree(private: PrivateKey, public: bytes, purpose: str, context: bytes) -> bytes:
    """A key that the holders of the two private keys have in common, for one purpose and context.

    Raises:
        SecureSumAborted: if the public key is one of the few with which everybody agrees on zero.
    """
    try:
        common = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureSumAborted("a public key is degenerate: whoever sent it wants a key that everybody knows") from error
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=f"dpfl {purpose} ".encode() + context).derive(common)


def seal(key: bytes, content: bytes, associated: bytes) -> bytes:
    """Encrypt and authenticate `content` together with `associated`, which is not sent (AES-256-GCM, fresh nonce)."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What was sealed.

    Raises:
        SecureSumAborted: if it was changed, sealed for another place, or with another key.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], associated)
    except (InvalidTag, ValueError) as error:
        raise SecureSumAborted("a sealed share does not open: it was changed on the way or meant for somebody else") from error


def add_mask(total: NDArray[np.uint32], seed: bytes, *, adds: bool = True) -> None:
    """Add to `total` `(size,)`, or take from it, uniform integers modulo 2^32: AES-256 in counter mode under `seed`."""
    stream, put = SecureRandom(seed), np.add if adds else np.subtract
    for start in range(0, len(total), _BLOCK):
        block = total[start : start + _BLOCK]
        put(block, stream.uint64((len(block) + 1) // 2).view(np.uint32)[: len(block)], out=block)


def split(secret: bytes, places: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a 32-byte secret by place; any `threshold` of them give it back, fewer say nothing (Shamir 1979).

    Args:
        secret: 32 bytes.
        places: distinct, 1 to 2^32.
        threshold: at least 1.
    """
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = value * place + coefficient  # places are small: one reduction at the end is much faster than one each
        shares[place] = (value % PRIME).to_bytes(SHARE_BYTES)
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of which these are shares, as many as the threshold; None if they are shares of nothing that `split` takes."""
    places = list(shares)
    # Lagrange's weights at zero over their common denominator, whose one inverse is all that is slow.
    below = [math.prod(other - place for other in places if other != place) for place in places]
    common, every = math.lcm(*below), math.prod(places)
    weights = (every // place * (common // each) for place, each in zip(places, below, strict=True))
    total = sum(int.from_bytes(share) * weight for share, weight in zip(shares.values(), weights, strict=True))
    secret = total * pow(common, -1, PRIME) % PRIME
    return secret.to_bytes(KEY_BYTES) if secret < 1 << 8 * KEY_BYTES else None
