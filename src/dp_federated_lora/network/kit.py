"""What a member has to connect with, and how it gets it without a private key ever leaving its machine.

The provisioner sends an invitation; `join` makes the keys in a folder and writes a request; the provisioner answers with
kit.json, and then the folder is a kit:

    invitation.json  who invites whom, and the public keys of the authority, which everything later must be signed by
    tls.key          private key of the certificate (0600)
    signing.key      private key that signs what this member sends (0600)
    request.json     the two public keys, signed by both private ones
    kit.json         the certificate, the servers and everybody's public keys, signed by the authority
"""

from __future__ import annotations

import json
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar, final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, ValidationError

from dp_federated_lora.errors import KitRefused, StorageError
from dp_federated_lora.files import write_durably
from dp_federated_lora.lab.sections import Section
from dp_federated_lora.network.authority import create_key, fingerprint_of, load_key, load_signing_key
from dp_federated_lora.network.project import Member, Name, Rights, Role, Server, Servers, subject_of
from dp_federated_lora.signing import SigningKey, signature_holds
from dp_federated_lora.storage import canonical

INVITATION: Final = "invitation.json"
REQUEST: Final = "request.json"
KIT: Final = "kit.json"
TLS_KEY: Final = "tls.key"
SIGNING_KEY: Final = "signing.key"

PublicKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Document(Section):
    """A signed file about one member."""

    project: Name
    role: Role
    name: Name

    @property
    def member(self) -> Member:
        """Whom it is about."""
        return Member(self.role, self.name)


class Invitation(Document):
    """invitation.json: signed by the authority.

    `authority` is its certificate (PEM), `public_key` that of its signing key, `fingerprint` that of both.
    """

    servers: Servers
    authority: str
    public_key: PublicKey
    fingerprint: str


class Request(Document):
    """request.json: `csr` is a certificate request (PEM), `public_key` that of the member's signing key, which signs the file."""

    csr: str
    public_key: PublicKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of who asks with which keys, hexadecimal; the provisioner compares it with the member by another way."""
        return fingerprint_of(self.project, str(self.member), self.csr, self.public_key)


class Administrator(Section):
    """What an administrator may do, and its public key once it has joined."""

    rights: Rights
    public_key: PublicKey | None


class Membership(Document):
    """kit.json: signed by the authority.

    `certificate` is the member's (PEM), `public_key` that of its signing key; `sites`, `coordinators` and `administrators` have
    the public keys of those who had joined when it was written.
    """

    certificate: str
    public_key: PublicKey
    servers: Servers
    sites: dict[Name, PublicKey]
    coordinators: dict[Name, PublicKey]
    administrators: dict[Name, Administrator]


PURPOSES: Final[Mapping[type[Document], str]] = {Invitation: "invitation", Request: "kit request", Membership: "kit"}

D = TypeVar("D", bound=Document)


def seal(document: Document, key: SigningKey) -> bytes:
    """A document as the content of its file, signed."""
    content = document.model_dump(mode="json")
    return _text(content, key.sign(PURPOSES[type(document)], canonical(content).encode()))


def unseal(path: Path, kind: type[D], public_key: str | None = None) -> D:
    """Read a signed file, of which every byte must be as it was written.

    Args:
        path: the file.
        kind: of document.
        public_key: of who must have signed it, hexadecimal; None for the key that the document states.

    Raises:
        KitRefused: if it is missing, damaged or signed by another key.
    """
    try:
        data = path.read_bytes()
        raw = json.loads(data)
        document = kind.model_validate_json(json.dumps(raw["content"]))
        content, signature = document.model_dump(mode="json"), str(raw["signature"]).lower()
    except OSError as error:
        raise KitRefused(f"cannot read {path}: {error.strerror}; copy the file that you were sent there") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not the text that was written"
        raise KitRefused(f"{path} is damaged: {what}; ask for it again") from error
    if data != _text(content, signature):
        raise KitRefused(f"{path} is damaged: it is not the text that was written; ask for it again")
    signer = public_key or str(content["public_key"])
    if not signature_holds(signer, PURPOSES[kind], canonical(content).encode(), signature):
        raise KitRefused(
            f"{path} is not signed by the key {signer[:12]}: it was changed, or comes from another authority; ask for it again"
        )
    return document


def load_invitation(path: Path) -> Invitation:
    """Read an invitation.

    Raises:
        KitRefused: if it is missing or damaged. Whether it comes from the right authority, only its fingerprint can tell.
    """
    invitation = unseal(path, Invitation)
    if invitation.fingerprint != fingerprint_of(invitation.authority, invitation.public_key):
        raise KitRefused(f"{path} states another fingerprint than its keys have; ask for it again")
    return invitation


def join(invitation: Path, folder: Path) -> tuple[Invitation, Request]:
    """Make a member's keys in `folder` (0700, keys 0600), and the request to send back.

    Args:
        invitation: the file that was sent.
        folder: the kit to be.

    Returns:
        The invitation and the request; their fingerprints are to be compared with the provisioner.

    Raises:
        KitRefused: if the invitation is damaged, or the folder holds keys already.
        StorageError: if the disk refuses.
    """
    invited = load_invitation(invitation)
    for path in (folder / name for name in (TLS_KEY, SIGNING_KEY, REQUEST, KIT)):
        if path.exists():
            raise KitRefused(f"{path} exists: somebody has joined with this folder before; send its {REQUEST}, or name another")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the kit {folder}: {error.strerror}; name another folder") from error
    key, signing = create_key(folder / TLS_KEY), SigningKey.create(folder / SIGNING_KEY)
    subject = subject_of(invited.project, str(invited.member))
    csr = x509.CertificateSigningRequestBuilder(subject).sign(key, algorithm=None).public_bytes(Encoding.PEM).decode()
    request = Request(project=invited.project, role=invited.role, name=invited.name, csr=csr, public_key=signing.public)
    write_durably(folder / INVITATION, invitation.read_bytes())
    write_durably(folder / REQUEST, seal(request, signing))
    return invited, request


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What a member's program connects with; made by `load`.

    Args:
        project: its name.
        member: who this is.
        servers: where the broker is.
        tls: context of a client with the member's certificate: TLS 1.3, servers of this authority only.
        signing: the member's key to sign with.
        roster: public keys of the sites that have joined, by name, hexadecimal.
        coordinators: those of the coordinators.
        administrators: what each may do, and its public key.
        expires: when the certificate does, UTC.
    """

    project: str
    member: Member
    servers: tuple[Server, ...]
    tls: ssl.SSLContext
    signing: SigningKey
    roster: Mapping[str, str]
    coordinators: Mapping[str, str]
    administrators: Mapping[str, Administrator]
    expires: datetime

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a kit, and check that it is whole, this member's, and in date.

        Raises:
            KitRefused: naming the file that is missing, damaged, expired, of another member or authority or readable by
                others, and what to do about it.
        """
        invitation = load_invitation(folder / INVITATION)
        granted = unseal(folder / KIT, Membership, invitation.public_key)
        if (granted.project, granted.member) != (invitation.project, invitation.member):
            raise KitRefused(
                f'{folder / KIT} is that of {granted.member} in "{granted.project}", and {INVITATION} beside it invites '
                f'{invitation.member} to "{invitation.project}"; copy the right one there'
            )
        signing = load_signing_key(folder / SIGNING_KEY)
        if signing.public != granted.public_key:
            raise KitRefused(f"{folder / SIGNING_KEY} is not the key that {KIT} was made for; put that one back")
        certificate = x509.load_pem_x509_certificate(granted.certificate.encode())
        _check_certificate(certificate, invitation, folder)
        return cls(
            project=granted.project,
            member=granted.member,
            servers=granted.servers,
            tls=client_context(invitation.authority, granted.certificate, folder / TLS_KEY),
            signing=signing,
            roster=granted.sites,
            coordinators=granted.coordinators,
            administrators=granted.administrators,
            expires=certificate.not_valid_after_utc,
        )


def client_context(authority: str, certificate: str, key: Path) -> ssl.SSLContext:
    """A TLS 1.3 client with a certificate, which trusts the servers of one authority; certificates are PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority)
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # public, and ssl reads nothing but files
        file.write(certificate)
        file.flush()
        context.load_cert_chain(file.name, key)
    return context


def _check_certificate(certificate: x509.Certificate, invitation: Invitation, folder: Path) -> None:
    """Refuse a certificate that is out of date, not of the key in the folder, or not of the authority that invited."""
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise KitRefused(
            f"{folder / KIT} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the provisioner for a new one"
        )
    if load_key(folder / TLS_KEY).public_key() != certificate.public_key():
        raise KitRefused(f"{folder / TLS_KEY} is not the key that {KIT} was made for; put that one back")
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(invitation.authority.encode()))
    except (InvalidSignature, ValueError) as error:
        raise KitRefused(
            f"the certificate in {folder / KIT} is of another authority than {INVITATION} beside it; ask for both again"
        ) from error


def _text(content: Mapping[str, Any], signature: str) -> bytes:
    return (json.dumps({"content": content, "signature": signature}, indent=2) + "\n").encode()
