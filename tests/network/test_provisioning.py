"""Who belongs to a project: keys stay where they are made, and nothing but the kit that was signed is accepted."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from dp_federated_lora.cli import main as cli
from dp_federated_lora.errors import ConfigError, KitRefused, StorageError
from dp_federated_lora.network.authority import Authority, load_certificate, load_key, pem_of
from dp_federated_lora.network.kit import Invitation, Kit, Membership, Request, join, load_invitation, seal, unseal
from dp_federated_lora.network.project import Member, Project, subject_of
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.signing import SigningKey
from kits import a_project

RUNNER = CliRunner()
EVERYBODY = ("a", "b", "main", "alice", "bob")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def kit(kits: Path, out: Path) -> Path:
    """Site a's whole kit, in a folder with everybody's."""
    shutil.copytree(kits, out)
    return out / "a"


def answer(out: Path, home: Path, name: str) -> None:
    """What member `name` and the provisioner do with an invitation."""
    join(out / name / "invitation.json", home / name)
    shutil.copy(home / name / "request.json", out / name)


def granted(kit: Path) -> Membership:
    return unseal(kit / "kit.json", Membership, load_invitation(kit / "invitation.json").public_key)


def certificate_of(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(granted(kit).certificate.encode())


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_private_keys_are_made_at_the_member_and_stay_there(out: Path, tmp_path: Path):
    project, home = a_project(), tmp_path / "home"
    first = provision(project, out)
    assert (first.waiting, first.signed, first.refused) == (EVERYBODY, {}, {})
    for name in EVERYBODY:
        answer(out, home, name)
    second = provision(project, out)
    assert second.fingerprint == first.fingerprint == load_invitation(home / "a" / "invitation.json").fingerprint
    assert second.signed == {name: unseal(home / name / "request.json", Request).fingerprint for name in EVERYBODY}
    for name in EVERYBODY:
        shutil.copy(out / name / "kit.json", home / name)
        assert {path.name for path in (out / name).iterdir()} == {"invitation.json", "request.json", "kit.json"}
        assert {path.name: path.stat().st_mode & 0o777 for path in (home / name).glob("*.key")} == {
            "tls.key": 0o600,
            "signing.key": 0o600,
        }
        assert (home / name).stat().st_mode & 0o777 == 0o700
    kits = {name: Kit.load(home / name) for name in EVERYBODY}
    public = {name: kit.signing.public for name, kit in kits.items()}
    for kit in kits.values():
        assert (kit.project, kit.servers) == ("lungs", project.servers)
        assert kit.roster == {"a": public["a"], "b": public["b"]}
        assert kit.coordinators == {"main": public["main"]}
        assert kit.administrators["bob"].rights == ("view",)
        assert kit.administrators["alice"].public_key == public["alice"]
        assert timedelta(days=29) < kit.expires - datetime.now(UTC) < timedelta(days=31)
    assert kits["alice"].member == Member("admin", "alice")


def test_the_keys_of_the_authority_and_the_broker_are_for_their_owner_only(kit: Path, out: Path):
    folders = [out / "authority", out / "broker", kit]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    keys = list(out.rglob("*.key"))
    assert len(keys) == 3 + 2 * len(EVERYBODY)
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


def test_a_second_provision_changes_nothing_for_those_who_are_done(kit: Path, out: Path):
    before = snapshot(out)
    again = provision(a_project(), out)
    assert (again.unchanged, again.renewed, again.signed) == (EVERYBODY, (), {})
    assert snapshot(out) == before
    assert provision(a_project(), out, with_keys=True).unchanged == EVERYBODY
    assert snapshot(out) == before


def test_who_joins_later_is_in_everybodys_next_kit_and_no_certificate_changes(out: Path, tmp_path: Path):
    project, home = a_project(), tmp_path / "home"
    provision(project, out)
    answer(out, home, "a")
    assert tuple(provision(project, out).signed) == ("a",)
    before = granted(out / "a")
    answer(out, home, "b")
    result = provision(project, out)
    after = granted(out / "a")
    assert (tuple(result.signed), result.renewed, result.waiting) == (("b",), ("a",), ("main", "alice", "bob"))
    assert (set(before.sites), set(after.sites)) == ({"a"}, {"a", "b"})
    assert (before.certificate, before.public_key) == (after.certificate, after.public_key)


def test_a_certificate_is_not_replaced_because_somebody_asks_with_other_keys(kit: Path, out: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in out.rglob("kit.json")}
    join(out / "a" / "invitation.json", tmp_path / "mallory")
    shutil.copy(tmp_path / "mallory" / "request.json", out / "a")
    result = provision(a_project(), out)
    assert set(result.refused) == {"a"}
    assert f"delete {out / 'a' / 'kit.json'}" in result.refused["a"]
    assert {path: path.read_bytes() for path in out.rglob("kit.json")} == before
    (out / "a" / "kit.json").unlink()
    assert set(provision(a_project(), out).signed) == {"a"}


def test_a_bad_request_is_refused_and_the_others_are_signed(out: Path, tmp_path: Path):
    project, home = a_project(), tmp_path / "home"
    provision(project, out)
    for name in EVERYBODY:
        answer(out, home, name)
    shutil.copy(home / "b" / "request.json", out / "a")
    text = (out / "main" / "request.json").read_text()
    (out / "main" / "request.json").write_text(text.replace('"main"', '"mail"'))
    theirs = unseal(home / "b" / "request.json", Request)
    key = SigningKey.load(home / "b" / "signing.key")
    assert key is not None
    stolen = Request(project="lungs", role="admin", name="bob", csr=unseal(home / "bob" / "request.json", Request).csr,
                     public_key=theirs.public_key)  # fmt: skip
    (out / "bob" / "request.json").write_bytes(seal(stolen, key))
    result = provision(project, out)
    assert set(result.signed) == {"b", "alice"}
    assert "is that of site/b" in result.refused["a"]
    assert "main/request.json is not signed by the key" in result.refused["main"]
    assert "signing key of site/b" in result.refused["bob"]
    assert not any((out / name / "kit.json").exists() for name in ("a", "main", "bob"))


def csr_of(subject: x509.Name, key: object = None) -> str:
    builder = x509.CertificateSigningRequestBuilder(subject)
    csr = builder.sign(generate_private_key(SECP256R1()), SHA256()) if key is None else builder.sign(key, None)  # type: ignore[arg-type]
    return csr.public_bytes(Encoding.PEM).decode()


def test_a_certificate_request_has_the_members_name_an_ed25519_key_and_a_signature(out: Path, tmp_path: Path):
    provision(a_project(), out)
    join(out / "a" / "invitation.json", tmp_path / "a")
    request = unseal(tmp_path / "a" / "request.json", Request)
    signing, key = SigningKey.load(tmp_path / "a" / "signing.key"), load_key(tmp_path / "a" / "tls.key")
    assert signing is not None
    der = x509.load_pem_x509_csr(request.csr.encode()).public_bytes(Encoding.DER)
    forged = x509.load_der_x509_csr(der[:-1] + bytes([der[-1] ^ 1])).public_bytes(Encoding.PEM).decode()
    for csr in ("", forged, csr_of(subject_of("lungs", "site/b"), key), csr_of(subject_of("lungs", "site/a"))):
        (out / "a" / "request.json").write_bytes(seal(request.model_copy(update={"csr": csr}), signing))
        assert "certificate request" in provision(a_project(), out).refused["a"]


def test_a_certificate_says_what_the_project_says_and_not_what_the_request_asks_for(out: Path, tmp_path: Path):
    provision(a_project(), out)
    join(out / "a" / "invitation.json", tmp_path / "a")
    request = unseal(tmp_path / "a" / "request.json", Request)
    signing, key = SigningKey.load(tmp_path / "a" / "signing.key"), load_key(tmp_path / "a" / "tls.key")
    assert signing is not None
    greedy = x509.CertificateSigningRequestBuilder(subject_of("lungs", "site/a"))
    greedy = greedy.add_extension(x509.SubjectAlternativeName([x509.DNSName("CN=coordinator/main,O=lungs")]), critical=False)
    csr = greedy.sign(key, None).public_bytes(Encoding.PEM).decode()
    (out / "a" / "request.json").write_bytes(seal(request.model_copy(update={"csr": csr}), signing))
    provision(a_project(), out)
    certificate = certificate_of(out / "a")
    assert certificate.subject == subject_of("lungs", "site/a")
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize("where", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("name", ["invitation.json", "kit.json", "tls.key", "signing.key"])
def test_a_kit_with_one_changed_byte_is_refused(kit: Path, name: str, where: float):
    data = bytearray((kit / name).read_bytes())
    place = int(where * len(data))
    data[place] ^= 1
    (kit / name).write_bytes(data)
    with pytest.raises(KitRefused, match=name.replace(".", r"\.")):
        Kit.load(kit)


@pytest.mark.parametrize("name", ["invitation.json", "kit.json", "tls.key", "signing.key"])
def test_a_kit_without_one_of_its_files_is_refused(kit: Path, name: str):
    (kit / name).unlink()
    with pytest.raises(KitRefused, match=name.replace(".", r"\.")):
        Kit.load(kit)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
@pytest.mark.parametrize("name", ["tls.key", "signing.key"])
def test_a_kit_whose_private_keys_are_not_private_is_refused(kit: Path, name: str, mode: int):
    (kit / name).chmod(mode)
    with pytest.raises(KitRefused, match=f"chmod 600 {kit / name}"):
        Kit.load(kit)


def other_member(kit: Path) -> None:
    shutil.copy(kit.parent / "b" / "kit.json", kit)


def other_authority(kit: Path) -> None:
    provision(a_project(), kit.parent / "other", with_keys=True)
    shutil.copy(kit.parent / "other" / "a" / "kit.json", kit)


def other_signing_key(kit: Path) -> None:
    shutil.copy(kit.parent / "b" / "signing.key", kit)


def other_tls_key(kit: Path) -> None:
    shutil.copy(kit.parent / "b" / "tls.key", kit)


def tls_key_of_another_kind(kit: Path) -> None:
    key = generate_private_key(SECP256R1())
    (kit / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def with_certificate(kit: Path, authority: Authority, now: datetime) -> None:
    """Put another certificate into kit.json, signed as ever."""
    certificate = authority.certify(subject_of("lungs", "site/a"), load_key(kit / "tls.key").public_key(), days=30, now=now)
    ours = Authority.open(kit.parent / "authority", "lungs").signing
    (kit / "kit.json").write_bytes(seal(granted(kit).model_copy(update={"certificate": pem_of(certificate)}), ours))


def expired(kit: Path) -> None:
    with_certificate(kit, Authority.open(kit.parent / "authority", "lungs"), datetime.now(UTC) - timedelta(days=31))


def certificate_of_another_authority(kit: Path) -> None:
    with_certificate(kit, Authority.open(kit.parent / "foreign", "lungs"), datetime.now(UTC))


FOREIGN: list[tuple[Callable[[Path], None], str]] = [
    (other_member, r"kit\.json is that of site/b .* invites site/a"),
    (other_authority, r"kit\.json is not signed by the key"),
    (other_signing_key, r"signing\.key is not the key"),
    (other_tls_key, r"tls\.key is not the key"),
    (tls_key_of_another_kind, r"tls\.key holds a key that is not Ed25519"),
    (expired, r"kit\.json expired on .*; ask the provisioner"),
    (certificate_of_another_authority, r"kit\.json is of another authority than invitation\.json"),
]


@pytest.mark.parametrize(("change", "message"), FOREIGN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_kit_that_is_foreign_or_expired_is_refused(kit: Path, change: Callable[[Path], None], message: str):
    change(kit)
    with pytest.raises(KitRefused, match=message):
        Kit.load(kit)


def test_an_expired_certificate_is_signed_anew_only_when_the_provisioner_says_so(kit: Path, out: Path):
    expired(kit)
    result = provision(a_project(), out)
    assert set(result.refused) == {"a"}
    assert "expired on" in result.refused["a"]
    (kit / "kit.json").unlink()
    assert set(provision(a_project(), out).signed) == {"a"}
    Kit.load(kit)


def test_an_invitation_cannot_state_the_fingerprint_of_another_authority(out: Path, tmp_path: Path):
    provision(a_project(), out)
    mine = Authority.open(tmp_path / "mine", "lungs")
    invitation = unseal(out / "a" / "invitation.json", Invitation)
    forged = invitation.model_copy(update={"public_key": mine.signing.public})
    (tmp_path / "invitation.json").write_bytes(seal(forged, mine.signing))
    with pytest.raises(KitRefused, match="another fingerprint"):
        join(tmp_path / "invitation.json", tmp_path / "kit")


def test_joining_twice_overwrites_no_key(out: Path, tmp_path: Path):
    provision(a_project(), out)
    join(out / "a" / "invitation.json", tmp_path / "kit")
    before = snapshot(tmp_path / "kit")
    with pytest.raises(KitRefused, match="name another"):
        join(out / "a" / "invitation.json", tmp_path / "kit")
    assert snapshot(tmp_path / "kit") == before
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="name another"):
        join(out / "a" / "invitation.json", tmp_path / "file" / "kit")


def test_a_damaged_kit_at_the_provisioner_stops_everything_as_others_would_lose_a_key(kit: Path, out: Path):
    (kit / "kit.json").write_bytes(b"{}")
    before = snapshot(out)
    with pytest.raises(KitRefused, match=r"a/kit\.json is damaged"):
        provision(a_project(), out)
    assert snapshot(out) == before
    shutil.copy(out / "b" / "kit.json", kit)
    with pytest.raises(KitRefused, match="is that of site/b"):
        provision(a_project(), out)


def test_a_folder_belongs_to_one_project_and_its_authority_is_whole_and_private(kit: Path, out: Path):
    with pytest.raises(ConfigError, match='the authority of "lungs", not of "hearts"'):
        provision(a_project(name="hearts"), out)
    shutil.copy(kit / "tls.key", out / "authority" / "authority.key")
    with pytest.raises(KitRefused, match=r"authority\.key does not belong"):
        provision(a_project(), out)
    (out / "authority" / "authority.key").chmod(0o644)
    with pytest.raises(KitRefused, match="chmod 600"):
        provision(a_project(), out)
    (out / "authority" / "authority.pem").write_text("")
    (out / "authority" / "authority.key").chmod(0o600)
    with pytest.raises(KitRefused, match=r"authority\.pem is damaged"):
        provision(a_project(), out)
    (out / "authority" / "authority.pem").unlink()
    with pytest.raises(KitRefused, match=r"authority\.pem: No such file"):
        provision(a_project(), out)


def test_the_broker_gets_a_certificate_for_its_hosts_and_keeps_its_key(out: Path):
    provision(a_project(), out)
    key = (out / "broker" / "server.key").read_bytes()
    hosts = ["127.0.0.1", "::1", "broker.example.org", "broker.example.org"]
    provision(a_project(servers=[{"host": host, "port": 1 + port} for port, host in enumerate(hosts)]), out)
    names = load_certificate(out / "broker" / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example.org"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert (out / "broker" / "server.key").read_bytes() == key
    assert unseal(out / "a" / "invitation.json", Invitation).servers[1].port == 2


PROJECT = """
name = "lungs"
days = 30
sites = ["a", "b"]
coordinators = ["main"]
[administrators]
alice = ["submit", "stop", "view"]
[[servers]]
host = "broker.example.org"
port = 4222
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"lungs"', '"Lungs"', "name"),
        ('"lungs"', '"lungs,O=hearts"', "name"),
        ('"a"', '"a.b"', r"sites\.0"),
        ('"a"', '"*"', r"sites\.0"),
        ('"a"', '">"', r"sites\.0"),
        ('"a"', '"../a"', r"sites\.0"),
        ('"a"', '"a\\n"', r"sites\.0"),
        ('"a"', '"b"', "are called b"),
        ('"a"', '"main"', "are called main"),
        ('"a"', '"authority"', "are called authority"),
        ('["a", "b"]', "[]", "sites"),
        ("30", "0", "days"),
        ("30", '"30"', "days"),
        ('"view"', '"delete"', r"administrators\.alice\.2"),
        ('["submit", "stop", "view"]', "[]", r"administrators\.alice"),
        ("4222", "70000", r"servers\.0\.port"),
        ("broker.example.org", "broker example", r"servers\.0\.host"),
        ("days", "years", "days"),
        ("[[servers]]", "[[server]]", "servers"),
        ("=", ":", "not valid TOML"),
    ],
)
def test_a_project_file_that_is_wrong_is_refused_by_its_key(tmp_path: Path, old: str, new: str, message: str):
    path = tmp_path / "project.toml"
    path.write_text(PROJECT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"{path}[\s\S]*{message}"):
        Project.load(path)


def test_a_project_file_lists_its_members(tmp_path: Path):
    path = tmp_path / "project.toml"
    with pytest.raises(ConfigError, match="cannot read the project"):
        Project.load(path)
    path.write_text(PROJECT)
    assert [str(member) for member in Project.load(path).members] == ["site/a", "site/b", "coordinator/main", "admin/alice"]
    assert str(Project.load(path).servers[0]) == "broker.example.org:4222"


def test_the_commands_say_what_to_send_what_to_compare_and_that_keys_travelled(tmp_path: Path):
    path, out, kit = tmp_path / "project.toml", tmp_path / "out", tmp_path / "kit"
    path.write_text(PROJECT)

    def run(*arguments: object, code: int = 0) -> str:
        result = RUNNER.invoke(cli.app, [str(each) for each in arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    assert f"waiting    a: send {out / 'a' / 'invitation.json'}" in run("provision", path, out)
    joined = run("join", out / "a" / "invitation.json", kit)
    shutil.copy(kit / "request.json", out / "a")
    signed = run("provision", path, out)
    authority, request = (line.split()[-1] for line in joined.splitlines()[1:3])
    assert f"Authority {authority}" in signed
    assert f"signed     a: request {request}; send {out / 'a' / 'kit.json'}" in signed
    assert "PRIVATE KEYS" not in signed
    asked = json.loads(run("join", out / "b" / "invitation.json", tmp_path / "b", "--json"))
    shutil.copy(tmp_path / "b" / "request.json", out / "b")
    facts = json.loads(run("provision", path, out, "--json"))
    assert facts["signed"] == {"b": asked["request"]}
    assert (facts["renewed"], facts["keys_made_here"], asked["member"]) == (["a"], False, "site/b")
    everybody = run("provision", path, out, "--with-keys")
    assert "unchanged" not in everybody and "PRIVATE KEYS WERE MADE HERE" in everybody
    shutil.copy(kit / "request.json", out / "b")
    refused = run("provision", path, out, code=1)
    assert "refused    b:" in refused and "unchanged  a" in refused
    for command in ("provision", "join"):
        assert f"Example: dpfl {command}" in run(command, "--help")
