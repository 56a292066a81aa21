"""Corpora made of Debian packages, and `large`: all of them and the speeches, about 136 MB of text.

A mix on purpose: a dictionary and glosses (facts in few words), manuals (long documents, code), and five languages
beside English (so that the vocabulary has something to compress).
"""

import gzip
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engram.data.corpora import Corpus, Source
from engram.data.debian import Member, Package, get_package
from engram.data.dictionaries import dictd_entries, wordnet_glosses
from engram.data.documents import Document
from engram.data.extractors import html_to_text, pod_to_text, rst_to_text
from engram.data.progress import Progress

_HANDBOOK_LANGUAGES = ("en-US", "de-DE", "es-ES", "fr-FR", "it-IT", "ja-JP")
_HELP_LANGUAGES = ("en-gb", "de", "es", "fr")
_HANDBOOK_SKIPPED = frozenset(("docnav", "toc", "banner"))


@dataclass(frozen=True)
class DebianCorpus:
    """A corpus made of packages: their names and the wanted files as regular expressions, and how files become text."""

    name: str
    description: str
    licence: str
    megabytes: float
    packages: tuple[str, ...]
    wanted: str
    extract: Callable[[Iterable[Member]], Iterator[Document]]

    def corpus(self) -> Corpus:
        needs = "apt-get and dpkg-deb, network once"
        return Corpus(self.name, self.description, self.licence, self.megabytes, needs, self._open)

    def _open(self, cache: Path, progress: Progress) -> Source:
        packages = [get_package(name, cache, progress) for name in self.packages]
        return Source(
            name=self.name,
            licence=self.licence,
            origin=", ".join(f"{package.name} {package.version}" for package in packages),
            read=lambda: self._read(packages),
            packages={package.file.name: package.sha256 for package in packages},
        )

    def _read(self, packages: list[Package]) -> Iterator[Document]:
        for package in packages:
            yield from self.extract(package.members(self.wanted))


def pages(members: Iterable[Member], to_text: Callable[[str], str]) -> Iterator[Document]:
    """A document for each file, unzipped where its name ends in .gz."""
    for path, data in members:
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8", "replace")
        yield Document(to_text(text), {"origin": path})


def dictionary(members: Iterable[Member]) -> Iterator[Document]:
    """A document for each entry of a dictd dictionary, which is a pair of files: .index and .dict.dz."""
    files = {path.rpartition(".")[2]: data for path, data in members}
    if files.keys() != {"index", "dz"}:
        return
    for headword, definition in dictd_entries(files["index"].decode(), gzip.decompress(files["dz"])):
        yield Document(definition, {"origin": headword})


def glosses(members: Iterable[Member]) -> Iterator[Document]:
    """A document for each synset of WordNet's data files."""
    for path, data in members:
        for number, gloss in enumerate(wordnet_glosses(data.decode())):
            yield Document(gloss, {"origin": f"{path}: synset {number}"})


DEBIAN_CORPORA = (
    DebianCorpus(
        name="gcide",
        description="Collaborative International Dictionary of English (Webster 1913, ...); a document is an entry",
        licence="GPL-3+",
        megabytes=35,
        packages=("dict-gcide",),
        wanted=r"usr/share/dictd/gcide\.(index|dict\.dz)",
        extract=dictionary,
    ),
    DebianCorpus(
        name="wordnet",
        description="WordNet 3.0, words and gloss of each synset; a document is a synset",
        licence="WordNet 3.0",
        megabytes=12,
        packages=("wordnet-base",),
        wanted=r"usr/share/wordnet/data\.(noun|verb|adj|adv)",
        extract=glosses,
    ),
    DebianCorpus(
        name="linux_doc",
        description="Linux kernel documentation; a document is a file",
        licence="GPL-2",
        megabytes=30,
        packages=(r"linux-doc-\d+\.\d+",),
        wanted=r"usr/share/doc/linux-doc-[^/]+/Documentation/.*\.(rst|txt)(\.gz)?",
        extract=partial(pages, to_text=rst_to_text),
    ),
    DebianCorpus(
        name="python_doc",
        description="Python documentation; a document is a page",
        licence="PSF-2.0",
        megabytes=10,
        packages=(r"python3\.\d+-doc",),
        wanted=r"usr/share/doc/[^/]+/html/_sources/.*\.rst\.txt",
        extract=partial(pages, to_text=rst_to_text),
    ),
    DebianCorpus(
        name="perl_doc",
        description="Perl documentation; a document is a manual page",
        licence="Artistic or GPL-1+",
        megabytes=8,
        packages=("perl-doc",),
        wanted=r"usr/share/perl/.*\.pod",
        extract=partial(pages, to_text=pod_to_text),
    ),
    DebianCorpus(
        name="debian_handbook",
        description=f"Debian Administrator's Handbook ({', '.join(_HANDBOOK_LANGUAGES)}); a document is a section",
        licence="GPL-2+ or CC-BY-SA-3.0",
        megabytes=7.5,
        packages=("debian-handbook",),
        wanted=rf"usr/share/doc/debian-handbook/html/({'|'.join(_HANDBOOK_LANGUAGES)})/[^/]+\.html",
        extract=partial(pages, to_text=partial(html_to_text, skipped=_HANDBOOK_SKIPPED)),
    ),
    DebianCorpus(
        name="libreoffice_help",
        description=f"LibreOffice help ({', '.join(_HELP_LANGUAGES)}); a document is a page",
        licence="MPL-2.0",
        megabytes=20.6,
        packages=tuple(f"libreoffice-help-{language}" for language in _HELP_LANGUAGES),
        wanted=r"usr/share/libreoffice/help/[^/]+/text/.*\.html",
        # The page offers each shortcut twice, for macOS and for other systems.
        extract=partial(pages, to_text=partial(html_to_text, root_id="DisplayArea", skipped=frozenset(("MAC",)))),
    ),
)

LARGE = ("sotu", *(corpus.name for corpus in DEBIAN_CORPORA))
