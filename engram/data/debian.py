"""Debian packages as sources of text: downloaded once into a cache folder, read without installing or unpacking them.

`apt-get download` checks the archive's signatures and needs no root. What is in the cache already is used as it is, so
a machine without network works with a cache folder copied to it.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engram.data.errors import DataError
from engram.data.manifest import file_digest
from engram.data.progress import Progress


class Member(NamedTuple):
    """A file of a package: its path inside, without a leading ./, and its bytes."""

    path: str
    data: bytes


@dataclass(frozen=True)
class Package:
    """A package file on this machine."""

    file: Path
    name: str
    version: str
    sha256: str

    def members(self, wanted: str) -> Iterator[Member]:
        """Regular files whose whole path matches the regular expression `wanted`, in the order of the package."""
        pattern = re.compile(wanted)
        command = ("dpkg-deb", "--fsys-tarfile", str(self.file))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    for entry in archive:
                        path = entry.name.removeprefix("./")
                        content = archive.extractfile(entry) if entry.isreg() and pattern.fullmatch(path) else None
                        if content is not None:
                            yield Member(path, content.read())
            except tarfile.TarError as error:
                raise DataError(
                    f"{self.file}: is not a whole package ({error}): delete it, and it is downloaded again"
                ) from None
            finally:
                process.kill()


def get_package(name: str, cache: Path, progress: Progress) -> Package:
    """The package whose name matches the regular expression `name`: from the cache, or downloaded into it.

    Of several names (python3.11-doc, python3.12-doc) the highest is taken. Raises DataError: a tool is missing, the
    package is unknown, or the download failed.
    """
    _need("dpkg-deb")
    cached = [file for file in cache.glob("*.deb") if re.fullmatch(name, file.name.partition("_")[0])]
    if not cached:
        cached = [_download(_resolve(name), cache, progress)]
    file = max(cached, key=lambda file: (file.stat().st_mtime, file.name))
    fields = _run(("dpkg-deb", "--showformat=${Package}\n${Version}\n", "--show", str(file)))
    if fields.returncode:
        raise DataError(f"{file}: is not a whole package: delete it, and it is downloaded again")
    package, version = fields.stdout.split()
    return Package(file, package, version, file_digest(file))


def _resolve(name: str) -> str:
    _need("apt-get")
    known = _run(("apt-cache", "pkgnames")).stdout.split()
    matching = [package for package in known if re.fullmatch(name, package)]
    if not matching:
        raise DataError(
            f"package {name}: is not in this machine's package lists: run `apt-get update` as root; where the "
            "distribution lacks the package, leave the corpus out of data.sources"
        )
    return max(matching, key=lambda package: [int(number) for number in re.findall(r"\d+", package)])


def _download(package: str, cache: Path, progress: Progress) -> Path:
    progress.say(f"downloading package {package}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        # As root, apt would hand the download to a user who cannot write here, and warn.
        result = _run(("apt-get", "-o", "APT::Sandbox::User=root", "download", package), folder)
        files = list(Path(folder).glob("*.deb"))
        if result.returncode or len(files) != 1:
            reason = " ".join(result.stderr.split()) or "no file arrived"
            raise DataError(
                f"package {package}: apt-get download failed: {reason}: check the network, run `apt-get update` as "
                f"root, or put the .deb file into {cache}"
            )
        return files[0].rename(cache / files[0].name)


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        raise DataError(
            f"{tool} is missing: corpora made of Debian packages need a Debian or Ubuntu machine; leave them out of "
            "data.sources, or prepare there and copy data.path"
        )


def _run(command: tuple[str, ...], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
