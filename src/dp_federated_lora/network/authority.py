"""A project's authority: an X.509 certificate authority and a signing key beside it, in one folder that stays with its owner.

All keys are Ed25519. Of a certificate request only the public key is taken: what a certificate says, the project says.
"""

from __future__ import annotations

import hashlib
import ipaddress
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self, final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dp_federated_lora.errors import ConfigError, KitRefused, LedgerKeyLost, StorageError
from dp_federated_lora.files import write_durably
from dp_federated_lora.network.project import subject_of
from dp_federated_lora.signing import SigningKey
from dp_federated_lora.storage import canonical

_LIFETIME: Final = timedelta(days=7300)  # of the authority: longer than any certificate that it signs
_SKEW: Final = timedelta(hours=1)  # how far a member's clock may be behind


@final
class Authority:
    """The keys that say who belongs to a project; use `open`."""

    def __init__(self, certificate: x509.Certificate, key: Ed25519PrivateKey, signing: SigningKey) -> None:
        self._key = key
        self.certificate = certificate
        self.signing = signing

    @classmethod
    def open(cls, folder: Path, project: str) -> Self:
        """Read the authority of a project, or make one where there is none: the folder 0700, its keys 0600.

        Raises:
            ConfigError: if the folder holds the authority of another project.
            KitRefused: if it is incomplete, damaged or readable by others.
            StorageError: if the disk refuses.
        """
        if not folder.exists():
            _create(folder, project)
        key = load_key(folder / "authority.key")
        signing = load_signing_key(folder / "signing.key")
        certificate = load_certificate(folder / "authority.pem")
        if certificate.subject != subject_of(project, "authority"):
            (owner,) = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
            raise ConfigError(f'{folder} is the authority of "{owner.value!s}", not of "{project}"; name another folder')
        if certificate.public_key() != key.public_key():
            raise KitRefused(f"{folder / 'authority.key'} does not belong to authority.pem beside it; restore both from a backup")
        return cls(certificate, key, signing)

    @property
    def pem(self) -> str:
        """Its certificate, which every member has."""
        return pem_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its two public keys' documents, hexadecimal: what members compare with its owner by another way."""
        return fingerprint_of(self.pem, self.signing.public)

    def certify(
        self, subject: x509.Name, key: Ed25519PublicKey, *, days: int, hosts: Sequence[str] = (), now: datetime | None = None
    ) -> x509.Certificate:
        """Sign a certificate.

        Args:
            subject: whose.
            key: its public key.
            days: how long it is valid.
            hosts: names and addresses of a server of the broker; without any it is a member's, which no server can use.
            now: when it begins; default now.
        """
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(subject, self.certificate.subject, key, now or datetime.now(UTC), timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        if hosts:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)  # and a client of the broker's other servers
            names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
            builder = builder.add_extension(names, critical=False)
        return builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False).sign(self._key, algorithm=None)


def fingerprint_of(*parts: str) -> str:
    """SHA-256 of texts, in order, hexadecimal."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def pem_of(certificate: x509.Certificate) -> str:
    """A certificate as text."""
    return certificate.public_bytes(Encoding.PEM).decode()


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a private key for TLS and save it, readable by its owner only.

    Raises:
        StorageError: if it cannot be saved.
    """
    key = Ed25519PrivateKey.generate()
    write_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """A private key that `create_key` saved.

    Raises:
        KitRefused: if it is missing, damaged or readable by others.
    """
    refuse_shared(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KitRefused(f"cannot read {path}: {error.strerror}; fix its permissions") from error
    except (ValueError, TypeError) as error:  # TypeError: encrypted
        raise KitRefused(f"{path} is damaged: it holds no plain private key; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KitRefused(f"{path} holds a key that is not Ed25519; restore the one that was made here")
    return key


def load_signing_key(path: Path) -> SigningKey:
    """A signing key that must be there.

    Raises:
        KitRefused: if it is missing, damaged or readable by others.
    """
    refuse_shared(path)
    try:
        key = SigningKey.load(path)
    except LedgerKeyLost as error:
        raise KitRefused(str(error)) from error
    if key is None:
        raise KitRefused(f"cannot read {path}: it belongs to another user; fix its owner")
    return key


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate.

    Raises:
        KitRefused: if it is missing or damaged.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise KitRefused(f"cannot read {path}: {error.strerror}; restore it from a backup") from error
    except ValueError as error:
        raise KitRefused(f"{path} is damaged: it holds no certificate; restore it from a backup") from error


def refuse_shared(path: Path) -> None:
    """Let a private file pass only if nobody else may read it.

    Raises:
        KitRefused: if somebody may, or if there is none.
    """
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise KitRefused(
            f"the private key {path} is missing ({error.strerror}); restore it from a backup, or begin anew"
        ) from error
    if mode & 0o077:
        raise KitRefused(f"the private key {path} may be used by others (mode {mode:o}); run: chmod 600 {path}")


def _create(folder: Path, project: str) -> None:
    """Make an authority, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".authority-", dir=folder.parent))  # 0700
        key = create_key(scratch / "authority.key")
        SigningKey.create(scratch / "signing.key")
        name = subject_of(project, "authority")
        builder = _builder(name, name, key.public_key(), datetime.now(UTC), _LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = builder.add_extension(_key_usage(authority=True), critical=True).sign(key, algorithm=None)
        write_durably(scratch / "authority.pem", pem_of(certificate).encode())
        scratch.rename(folder)
    except OSError as error:
        raise StorageError(f"cannot make the authority {folder}: {error.strerror}; name another folder") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, begin: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begin - _SKEW).not_valid_after(begin + lifetime)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
