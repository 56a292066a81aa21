import gzip
import re

import pytest

from engram.data.corpora import known_corpora
from engram.data.debian import Member
from engram.data.recipe import DEBIAN_CORPORA, LARGE, DebianCorpus, dictionary
from tests.data.test_dictionaries import make_dictd

BY_NAME = {corpus.name: corpus for corpus in DEBIAN_CORPORA}
PAGE = "<body><ul class='docnav'><li>Next</li></ul><div id='DisplayArea'><h1>Kopf</h1><p>Text</p></div></body>"


def files_of(name: str) -> list[Member]:
    """Small files at the places where the packages have them, wanted ones and others."""
    index, data = make_dictd([(["Ant"], "Ant, n.\n   An insect.\n   [1913 Webster]\n"), (["Bee"], "Bee.\n")])
    return {
        "gcide": [
            Member("usr/share/dictd/gcide.dict.dz", gzip.compress(data)),
            Member("usr/share/dictd/gcide.index", index.encode()),
        ],
        "wordnet": [
            Member("usr/share/wordnet/data.noun", b"00001740 03 n 01 entity 0 000 | that which is\n"),
            Member("usr/share/wordnet/index.noun", b"no"),
        ],
        "linux_doc": [
            Member(
                "usr/share/doc/linux-doc-6.1/Documentation/mm/a.rst.gz", gzip.compress(b"Pages\n=====\n\n``kmalloc``")
            ),
            Member("usr/share/doc/linux-doc-6.1/Documentation/b.txt", b"plain"),
            Member("usr/share/doc/linux-doc-6.1/html/_sources/mm/a.rst.txt", b"again"),
        ],
        "python_doc": [
            Member("usr/share/doc/python3.11/html/_sources/library/os.rst.txt", b":mod:`os`"),
            Member("usr/share/doc/python3.11/html/library/os.html", b"no"),
        ],
        "perl_doc": [
            Member("usr/share/perl/5.36.0/pod/perlsub.pod", b"=head1 NAME\n\nB<sub>\n"),
            Member("usr/share/doc/perl/README.gz", b"no"),
        ],
        "debian_handbook": [
            Member("usr/share/doc/debian-handbook/html/de-DE/apt.html", PAGE.encode()),
            Member("usr/share/doc/debian-handbook/html/xx-XX/apt.html", PAGE.encode()),
        ],
        "libreoffice_help": [
            Member("usr/share/libreoffice/help/de/text/shared/a.html", PAGE.encode()),
            Member("usr/share/libreoffice/help/de/a.html", PAGE.encode()),
        ],
    }[name]


TEXTS = {
    "gcide": ["Ant, n.\n   An insect.\n", "Bee.\n"],
    "wordnet": ["entity (noun): that which is\n"],
    "linux_doc": ["Pages\n\nkmalloc\n", "plain\n"],
    "python_doc": ["os\n"],
    "perl_doc": ["NAME\n\nsub\n"],
    "debian_handbook": ["Kopf\n\nText\n"],
    "libreoffice_help": ["Kopf\n\nText\n"],
}


@pytest.mark.parametrize("corpus", DEBIAN_CORPORA, ids=lambda corpus: corpus.name)
def test_wanted_files_become_documents(corpus: DebianCorpus) -> None:
    wanted = [member for member in files_of(corpus.name) if re.fullmatch(corpus.wanted, member.path)]
    documents = list(corpus.extract(iter(wanted)))
    assert [document.text for document in documents] == TEXTS[corpus.name]
    assert all(document.meta["origin"] for document in documents)


def test_incomplete_dictionary_has_no_documents() -> None:
    assert list(dictionary(files_of("gcide")[:1])) == []


def test_large_names_known_corpora_once() -> None:
    assert set(LARGE) <= set(known_corpora())
    assert len(set(LARGE)) == len(LARGE)
    assert set(BY_NAME) | {"sotu"} == set(LARGE)
    megabytes = sum(known_corpora()[name].megabytes for name in LARGE)
    assert 100 < megabytes < 150


@pytest.mark.parametrize("corpus", DEBIAN_CORPORA, ids=lambda corpus: corpus.name)
def test_package_names_are_expressions_of_one_package_each(corpus: DebianCorpus) -> None:
    assert corpus.licence and corpus.description
    assert all(re.compile(name) for name in corpus.packages)
