"""The key that signs a ledger's rows and statements: Ed25519 (RFC 8032), one private key file per ledger database."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn, Self, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from dp_federated_lora.errors import LedgerKeyLost, PrivacyError
from dp_federated_lora.files import write_durably


@final
class SigningKey:
    """A private key; use `create` or `load`.

    Every signature is over a purpose and a content, so that one made for a row never passes for a statement.
    """

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw().hex()

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a key and save it, durably and readable by its owner only (PEM, PKCS 8).

        Raises:
            StorageError: if it cannot be saved.
            LedgerKeyLost: if there is a file that this user may not read.
        """
        if path.exists():
            raise LedgerKeyLost(f"{path} exists but may not be read by this user; nothing was overwritten")
        key = Ed25519PrivateKey.generate()
        write_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The key at `path`; None where there is none or this user may not read it.

        Raises:
            LedgerKeyLost: if the file holds no Ed25519 key.
        """
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (FileNotFoundError, PermissionError):
            return None
        except (ValueError, TypeError) as error:  # TypeError: encrypted
            raise LedgerKeyLost(f"{path} is damaged: it holds no plain private key; restore it from a backup") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise LedgerKeyLost(f"{path} holds a key that is not Ed25519; name the ledger's own key")
        return cls(key)

    def sign(self, purpose: str, content: bytes) -> str:
        """The signature of `content` for `purpose`, 128 hexadecimal digits."""
        return self._key.sign(_message(purpose, content)).hex()

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a signing key cannot be pickled or copied: it stays in its file")


def signature_holds(public: str, purpose: str, content: bytes, signature: str) -> bool:
    """Whether `signature` is that of `content` for `purpose` under the public key `public`, all hexadecimal."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _message(purpose, content))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(purpose: str, content: bytes) -> bytes:
    return b"dpfl " + purpose.encode() + b"\0" + content
