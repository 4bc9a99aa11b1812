"""From `project.toml` to invitations and kits; run again and again until everybody has joined.

    OUT/authority/               the keys of the authority: they stay with the provisioner
    OUT/broker/                  certificate and key of the broker's servers
    OUT/NAME/invitation.json     for a member, who answers with
    OUT/NAME/request.json        put there by the provisioner, after which the next run writes
    OUT/NAME/kit.json            for the member

A certificate is signed once: kit.json is written again only when others have joined, and with the same certificate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dp_federated_lora.errors import KitRefused, StorageError
from dp_federated_lora.files import write_durably
from dp_federated_lora.network.authority import Authority, create_key, load_certificate, load_key, pem_of
from dp_federated_lora.network.kit import (
    INVITATION,
    KIT,
    REQUEST,
    Administrator,
    Invitation,
    Membership,
    Request,
    join,
    seal,
    unseal,
)
from dp_federated_lora.network.project import Member, Project, subject_of

# Files of OUT/broker/.
SERVER_CERTIFICATE: Final = "server.pem"
SERVER_KEY: Final = "server.key"
AUTHORITY_CERTIFICATE: Final = "authority.pem"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    """What one run has done.

    Args:
        fingerprint: of the authority; members compare it with that of their invitation.
        signed: who got a certificate now, by name, with the fingerprint of the request: to be compared with the member.
        renewed: whose kit.json was written anew, with the same certificate, as others have joined.
        unchanged: who is done, with nothing new.
        waiting: who has not sent a request.
        refused: whose request cannot be signed or whose certificate has expired, by name, and why; what they had stays as it is.
    """

    fingerprint: str
    signed: Mapping[str, str]
    renewed: tuple[str, ...]
    unchanged: tuple[str, ...]
    waiting: tuple[str, ...]
    refused: Mapping[str, str]


@final
@dataclass(frozen=True, slots=True)
class _Joined:
    """A member's certificate (PEM), and the public key that it signs with (hexadecimal)."""

    certificate: str
    public_key: str


def provision(project: Project, out: Path, *, with_keys: bool = False) -> Provisioned:
    """Invite every member, and sign the requests that are there.

    Args:
        project: whose members.
        out: the folder; made if it is not there.
        with_keys: make the keys of everybody who has not joined here, in OUT/NAME, which is then a whole kit.

    Raises:
        ConfigError: if `out` belongs to another project.
        KitRefused: if the authority or a kit.json is damaged, or keys are to be made where some are already.
        StorageError: if the disk refuses.
    """
    authority = Authority.open(out / "authority", project.name)
    _prepare_broker(project, authority, _folder(out / "broker", mode=0o700))
    for member in project.members:
        folder = _folder(out / member.name)
        _write(folder / INVITATION, seal(_invitation(project, authority, member), authority.signing))
        if with_keys and not any((folder / name).exists() for name in (REQUEST, KIT)):
            folder.chmod(0o700)
            join(folder / INVITATION, folder)
    old = {
        each: _granted(project, authority, each, out / each.name) for each in project.members if (out / each.name / KIT).exists()
    }
    joined = {each: _Joined(granted.certificate, granted.public_key) for each, granted in old.items()}
    signed: dict[str, str] = {}
    refused: dict[str, str] = {}
    for member in project.members:
        folder = out / member.name
        try:
            request = _request(project, member, folder / REQUEST) if (folder / REQUEST).exists() else None
            if member in old:
                _refuse_replacement(old[member], request, folder)
            elif request is not None:
                _refuse_shared_key(request, joined)
                joined[member] = _certified(project, authority, request, folder / REQUEST)
                signed[member.name] = request.fingerprint
        except KitRefused as error:
            refused[member.name] = str(error)
    written = {
        member: _write(out / member.name / KIT, seal(_kit(project, member, joined), authority.signing)) for member in joined
    }
    return Provisioned(
        fingerprint=authority.fingerprint,
        signed=signed,
        renewed=tuple(member.name for member in old if written[member]),
        unchanged=tuple(member.name for member in old if not written[member]),
        waiting=tuple(each.name for each in project.members if each not in joined and each.name not in refused),
        refused=refused,
    )


def _granted(project: Project, authority: Authority, member: Member, folder: Path) -> Membership:
    """What a member has been given; if that is unclear, nothing at all is signed, as others would lose its public key."""
    granted = unseal(folder / KIT, Membership, authority.signing.public)
    if (granted.project, granted.member) != (project.name, member):
        raise KitRefused(
            f'{folder / KIT} is that of {granted.member} in "{granted.project}", not of {member}; put the right one there, or '
            f"delete it to sign what is in {REQUEST}"
        )
    return granted


def _request(project: Project, member: Member, path: Path) -> Request:
    """A member's request, checked."""
    request = unseal(path, Request)
    if (request.project, request.member) != (project.name, member):
        raise KitRefused(
            f'{path} is that of {request.member} in "{request.project}", not of {member} in "{project.name}"; put each '
            "request into the folder of its member"
        )
    _key_of(request, path)
    return request


def _certified(project: Project, authority: Authority, request: Request, path: Path) -> _Joined:
    subject = subject_of(project.name, str(request.member))
    certificate = authority.certify(subject, _key_of(request, path), days=project.days)
    return _Joined(pem_of(certificate), request.public_key)


def _key_of(request: Request, path: Path) -> Ed25519PublicKey:
    """The public key of a certificate request whose sender has shown that it has the private one."""
    try:
        csr = x509.load_pem_x509_csr(request.csr.encode())
        key = csr.public_key()
        proven = csr.is_signature_valid
    except (ValueError, InvalidSignature) as error:
        raise KitRefused(f"{path} holds no certificate request; ask for another") from error
    if not isinstance(key, Ed25519PublicKey) or not proven or csr.subject != subject_of(request.project, str(request.member)):
        raise KitRefused(
            f"{path} holds a certificate request with another name, a key that is not Ed25519, or a signature that does not "
            "hold; ask for another"
        )
    return key


def _refuse_replacement(granted: Membership, request: Request | None, folder: Path) -> None:
    """Refuse to go on with a certificate that has expired, or to replace one by that of other keys."""
    fix = f"to sign what is in {REQUEST}, delete {folder / KIT} and run this again"
    certificate = x509.load_pem_x509_certificate(granted.certificate.encode())
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise KitRefused(f"the certificate in {folder / KIT} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {fix}")
    if request is not None and (_key_of(request, folder / REQUEST), request.public_key) != (
        certificate.public_key(),
        granted.public_key,
    ):
        raise KitRefused(
            f"{folder / REQUEST} asks for other keys than {granted.member} has a certificate for, and that stands; if it is "
            f"to be replaced: {fix}"
        )


def _refuse_shared_key(request: Request, joined: Mapping[Member, _Joined]) -> None:
    """Refuse a key that another member has: a signature would not say whose it is."""
    for other, its in joined.items():
        if its.public_key == request.public_key:
            raise KitRefused(f"{request.member} asks with the signing key of {other}; it has to run dpfl join itself")


def _invitation(project: Project, authority: Authority, member: Member) -> Invitation:
    return Invitation(
        project=project.name,
        role=member.role,
        name=member.name,
        servers=project.servers,
        authority=authority.pem,
        public_key=authority.signing.public,
        fingerprint=authority.fingerprint,
    )


def _kit(project: Project, member: Member, joined: Mapping[Member, _Joined]) -> Membership:
    keys = {each: its.public_key for each, its in joined.items()}
    return Membership(
        project=project.name,
        role=member.role,
        name=member.name,
        certificate=joined[member].certificate,
        public_key=keys[member],
        servers=project.servers,
        sites={each.name: key for each, key in keys.items() if each.role == "site"},
        coordinators={each.name: key for each, key in keys.items() if each.role == "coordinator"},
        administrators={
            name: Administrator(rights=rights, public_key=keys.get(Member("admin", name)))
            for name, rights in project.administrators.items()
        },
    )


def _prepare_broker(project: Project, authority: Authority, folder: Path) -> None:
    """Give the broker's servers a certificate for their hosts, unless they have one in date; their key is made once."""
    key_path, path = folder / SERVER_KEY, folder / SERVER_CERTIFICATE
    key = load_key(key_path) if key_path.exists() else create_key(key_path)
    _write(folder / AUTHORITY_CERTIFICATE, authority.pem.encode())
    fresh = authority.certify(
        subject_of(project.name, "broker"),
        key.public_key(),
        days=project.days,
        hosts=[server.host for server in project.servers],
    )
    if path.exists():
        old = load_certificate(path)
        hosts = [each.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for each in (old, fresh)]
        if hosts[0] == hosts[1] and old.public_key() == key.public_key() and old.not_valid_after_utc > datetime.now(UTC):
            return
    _write(path, pem_of(fresh).encode())


def _folder(path: Path, *, mode: int = 0o755) -> Path:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path}: {error.strerror}; name another") from error
    return path


def _write(path: Path, content: bytes) -> bool:
    """Write a file unless it is as it should be; whether it was not."""
    if path.exists() and path.read_bytes() == content:
        return False
    write_durably(path, content)
    return True
