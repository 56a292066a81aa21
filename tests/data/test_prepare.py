import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engram.config import Config
from engram.data import prepare as prepare_module
from engram.data.documents import text_digest
from engram.data.errors import DataError
from engram.data.manifest import NAME, read_manifest
from engram.data.prepare import prepare
from engram.data.shards import Dataset, verify_folder
from engram.data.tokenizer import load_tokenizer
from tests.data.conftest import FolderMaker, sentences

ConfigMaker = Callable[..., Config]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(400)))
    return file


@pytest.fixture
def config(make_config: ConfigMaker, text_file: Path) -> Config:
    return make_config(sources=[{"path": str(text_file)}], validation_fraction=0.1, shard_tokens=1024)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def neighbours(config: Config) -> set[str]:
    return {path.name for path in Path(config.data.path).parent.iterdir()}


def texts_in(folder: Path, split: str) -> list[str]:
    dataset, tokenizer = Dataset(folder, split, verify=True), load_tokenizer(folder)
    borders = [*dataset.documents.tolist(), dataset.num_tokens]
    parts = [dataset.window(start, end - start).tolist() for start, end in itertools.pairwise(borders)]
    assert all(part[-1] == tokenizer.eos_id and tokenizer.eos_id not in part[:-1] for part in parts)
    return [tokenizer.decode(part[:-1]) for part in parts]


def test_every_document_arrives_once(config: Config, text_file: Path) -> None:
    folder = prepare(config)
    train, validation = texts_in(folder, "train"), texts_in(folder, "validation")
    assert sorted(train + validation) == sorted(sentences(400))
    assert 20 < len(validation) < 70
    manifest = verify_folder(folder)
    assert len(manifest.splits["train"].shards) > 3
    (source,) = manifest.sources
    assert source.tokens == sum(split.tokens for split in manifest.splits.values())
    assert source.documents == 400
    assert source.characters == sum(map(len, sentences(400)))
    digest = hashlib.sha256(b"".join(map(text_digest, validation))).hexdigest()
    assert manifest.splits["validation"].digest == digest
    assert neighbours(config) == {"prepared", text_file.name}


def test_same_bytes_every_time(config: Config) -> None:
    first = contents(prepare(config))
    assert contents(prepare(config, force=True)) == first


def test_validation_text_does_not_train_the_tokenizer(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    train = prepare_module.train_tokenizer
    monkeypatch.setattr(
        prepare_module, "train_tokenizer", lambda texts, *rest: train(shown.extend(texts) or shown, *rest)
    )
    folder = prepare(config)
    assert sorted(shown) == sorted(texts_in(folder, "train"))


def test_finished_folder_is_left_alone(config: Config, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(prepare_module, "collect", None)
    assert prepare(config) == folder
    text_file.unlink()
    assert prepare(config.replace(data=config.data.replace(sequence_length=8))) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_need_force(config: Config) -> None:
    prepare(config)
    other = config.replace(data=config.data.replace(split_seed=9))
    with pytest.raises(DataError, match=r"data\.split_seed was 0, is 9: choose another data\.path, or .*--force"):
        prepare(other)
    assert read_manifest(prepare(other, force=True)).split_seed == 9


def test_damaged_folder_is_reported_and_replaced_by_force(config: Config) -> None:
    folder = prepare(config)
    (folder / "train_001.bin").unlink()
    with pytest.raises(DataError, match=r"train_001\.bin: is missing"):
        prepare(config)
    prepare(config, force=True)
    data = (folder / "train_000.bin").read_bytes()
    (folder / "train_000.bin").write_bytes(data[::-1])
    with pytest.raises(DataError, match=r"train_000\.bin: its sha256 is .*prepare CONFIG --force"):
        prepare(config)
    (folder / NAME).write_text("{")
    with pytest.raises(DataError, match="cut short"):
        prepare(config)
    prepare(config, force=True)
    verify_folder(folder)


def test_folder_with_other_files_is_never_touched(config: Config) -> None:
    folder = Path(config.data.path)
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(DataError, match=r"holds files but no manifest\.json.*choose another data\.path"):
            prepare(config, force=force)
    assert contents(folder) == {"thesis.tex": b"x"}


def test_a_file_in_the_way(config: Config) -> None:
    Path(config.data.path).write_text("x")
    with pytest.raises(DataError, match=r"data\.path is a file"):
        prepare(config)
    with pytest.raises(DataError, match=r"cannot be prepared: .*: choose another") as raised:
        prepare(config.replace(data=config.data.replace(path=f"{config.data.path}/below")))
    assert "space" not in str(raised.value)


@pytest.mark.parametrize("failing", ["collect", "train_tokenizer", "record_files"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), DataError("no")])
def test_failure_leaves_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    before = neighbours(config)
    monkeypatch.setattr(prepare_module, failing, fail)
    with pytest.raises((DataError, KeyboardInterrupt)) as raised:
        prepare(config)
    assert neighbours(config) == before
    if isinstance(error, OSError):
        assert "disk full: " in str(raised.value)
        assert "No space left on device: free space, or choose another data.path" in str(raised.value)


def test_failure_keeps_the_folder_that_was_there(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(prepare(config))
    monkeypatch.setattr(prepare_module, "record_files", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config, force=True)
    assert contents(Path(config.data.path)) == before


def test_leftovers_of_a_killed_process_go(config: Config) -> None:
    leftover = Path(config.data.path).with_name(".prepared.preparing")
    leftover.mkdir()
    (leftover / "spool").write_text("half")
    prepare(config)
    assert neighbours(config) == {"prepared", "text.jsonl"}


def test_given_tokenizer(config: Config, make_folder: FolderMaker, make_config: ConfigMaker, tmp_path: Path) -> None:
    model = make_folder([[5]]) / "tokenizer.model"
    data = config.data.model_dump() | {"path": str(tmp_path / "second"), "tokenizer": {"path": str(model)}}
    folder = prepare(make_config(**data))
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert sorted(texts_in(folder, "train") + texts_in(folder, "validation")) == sorted(sentences(400))
    data["path"] = str(tmp_path / "third")
    with pytest.raises(DataError, match=r"tokenizer\.model: the tokenizer has 320 ids, but model\.vocab_size is 500"):
        prepare(make_config(500, **data))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.model", None, r"none\.model: the tokenizer cannot be read: No such file or directory"),
        (".", None, r"holds no tokenizer\.model and no tokenizer\.json"),
        ("words.txt", b"a b", r"words\.txt: tokenizers are \.model"),
        ("bad.model", b"a b", r"bad\.model: is not a SentencePiece model"),
        ("bad.json", b"{}", r"bad\.json: is not a tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_told_before_the_corpus_is_read(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = neighbours(config)
    monkeypatch.setattr(prepare_module, "collect", lambda *_: pytest.fail("the corpus was read"))
    tokenizer = config.data.tokenizer.replace(path=str(tmp_path / name))
    with pytest.raises(DataError, match=f"^data.tokenizer.path .*{message}"):
        prepare(config.replace(data=config.data.replace(tokenizer=tokenizer)))
    assert neighbours(config) == before


def test_large_vocabulary(make_config: ConfigMaker, config: Config) -> None:
    data = config.data.model_dump() | {"tokenizer": {"path": "deepseek"}}
    folder = prepare(make_config(129_280, **data))
    dataset = Dataset(folder, "validation", verify=True, vocab_size=129_280)
    assert dataset.manifest.dtype == "uint32"
    assert dataset.windows(np.array([0]), 20).max() > 0
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(contents(folder))
    assert sorted(texts_in(folder, "train") + texts_in(folder, "validation")) == sorted(sentences(400))


def test_sources_with_shared_documents(make_config: ConfigMaker, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for number, text in enumerate([*sentences(3), "quite new\n"]):
        (tmp_path / "more" / f"{number}.txt").write_text(text)
    sources = [{"path": str(text_file)}, {"path": str(tmp_path / "more")}]
    manifest = read_manifest(prepare(make_config(sources=sources)))
    assert [(source.documents, source.duplicates) for source in manifest.sources] == [(400, 0), (1, 3)]
    assert manifest.sources[1].tokens < 15


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {}, "no .txt, .jsonl, .parquet file matches"),
        ({"a.txt": b"  \n"}, {}, "none of its 1 documents can be used"),
        ({"a.txt": b"one document\n" * 50}, {}, "split is empty"),
        ({"a.txt": b"caf\xe9"}, {}, "is not UTF-8: byte 0xe9 at offset 3"),
        ({"a.jsonl": b'{"text": "x"}\n{'}, {}, r"a\.jsonl:2: is not JSON"),
        ({f"{n}.txt": b"word %d" % n for n in range(9)}, {"validation_fraction": 0.5}, "supports at most"),
    ],
)
def test_bad_input_leaves_nothing(
    make_config: ConfigMaker, tmp_path: Path, files: dict[str, bytes], settings: dict, message: str
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name, data in files.items():
        (given / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare(make_config(sources=[{"path": str(given)}], **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
