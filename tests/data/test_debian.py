"""Packages are built here; apt-get is a script that pretends to download them."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engram.data.debian import get_package
from engram.data.errors import DataError
from engram.data.progress import Progress

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing")

PackageBuilder = Callable[..., Path]


@pytest.fixture
def build_package(tmp_path: Path) -> PackageBuilder:
    def build(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
        root = tmp_path / "root" / f"{name}_{version}"
        control = root / "DEBIAN" / "control"
        control.parent.mkdir(parents=True)
        control.write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A B <a@b.c>\nDescription: x\n"
        )
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}_{version}_all.deb"
        subprocess.run(("dpkg-deb", "--build", "--root-owner-group", root, file), check=True, capture_output=True)
        return file

    return build


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs apt-get and apt-cache over a folder of packages: the archive."""
    archive, programs = tmp_path / "archive", tmp_path / "programs"
    archive.mkdir()
    programs.mkdir()
    scripts = {
        "apt-cache": f"ls {archive} | sed 's/_.*//'",
        "apt-get": f"for last; do :; done; cp {archive}/${{last}}_*.deb . 2>&- && exit; echo E: no route >&2; exit 9",
    }
    for name, line in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return archive


def test_download_and_read(build_package: PackageBuilder, fake_apt: Path, tmp_path: Path) -> None:
    files = {"usr/share/doc/a.txt": b"one", "usr/share/doc/b.txt": b"two" * 50_000, "usr/bin/c": b"no"}
    built = build_package(fake_apt, "tiny-doc", "1.5", files)
    cache = tmp_path / "cache"
    package = get_package("tiny-doc", cache, Progress())
    assert (package.name, package.version) == ("tiny-doc", "1.5")
    assert package.file.parent == cache
    assert package.sha256 == hashlib.sha256(built.read_bytes()).hexdigest()
    members = {member.path: member.data for member in package.members(r"usr/share/doc/.*\.txt")}
    assert members == {path: data for path, data in files.items() if path.endswith(".txt")}
    # Reading may stop early.
    assert next(package.members(r".*\.txt")).data in files.values()


def test_cached_package_needs_no_apt(
    build_package: PackageBuilder, fake_apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_package(tmp_path / "cache", "tiny-doc", "1.5", {"a": b"x"})
    for program in ("apt-get", "apt-cache"):
        (fake_apt.parent / "programs" / program).write_text("#!/bin/sh\nexit 1\n")
    assert get_package("tiny-doc", tmp_path / "cache", Progress()).version == "1.5"


def test_highest_name_is_taken(build_package: PackageBuilder, fake_apt: Path, tmp_path: Path) -> None:
    for name in ("doc-6.9", "doc-6.12", "doc-6.1", "doc-6.12-extra", "doc"):
        build_package(fake_apt, name, "1", {"a": name.encode()})
    assert get_package(r"doc-\d+\.\d+", tmp_path / "cache", Progress()).name == "doc-6.12"


def test_unknown_package(fake_apt: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tiny-doc: is not in this machine's package lists: run `apt-get update`"):
        get_package("tiny-doc", tmp_path / "cache", Progress())


def test_failed_download_leaves_nothing(build_package: PackageBuilder, fake_apt: Path, tmp_path: Path) -> None:
    build_package(fake_apt, "tiny-doc", "1", {"a": b"x"}).rename(fake_apt / "tiny-doc_gone")
    with pytest.raises(DataError, match="package tiny-doc: apt-get download failed: E: no route: check the network"):
        get_package("tiny-doc", tmp_path / "cache", Progress())
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_package(build_package: PackageBuilder, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = build_package(cache, "tiny-doc", "1", {"a.txt": bytes(range(256)) * 4000})
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"tiny-doc_1_all\.deb: is not a whole package: delete it"):
        get_package("tiny-doc", cache, Progress())


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="dpkg-deb is missing: corpora made of Debian packages need"):
        get_package("tiny-doc", tmp_path, Progress())
