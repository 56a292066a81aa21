"""Original files of benchmarks as rows of ours: one flat JSON object for each question.

Every converter takes a file's text and yields rows; a file of another form is a UserError that names what was expected.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from engram.config import UserError

Row = dict[str, Any]
Converter = Callable[[str], Iterator[Row]]


def lines(text: str) -> Iterator[Row]:
    """JSON lines, as they are."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds {type(row).__name__}, but each must be one JSON object")
        yield row


def lines_of(text: str) -> list[str]:
    """Lines that hold something. Unlike `splitlines`, strings of JSON may hold other ends of lines, such as U+2028."""
    return [line for line in text.split("\n") if line.strip()]


def c3(text: str) -> Iterator[Row]:
    """C3's m-*.json and d-*.json: [[sentences], [{question, choice, answer}], id] for each text."""
    for sentences, questions, identity in json.loads(text):
        for number, one in enumerate(questions):
            if one["answer"] not in one["choice"]:
                raise ValueError(f"question {number} of {identity} has an answer that is none of its choices")
            yield {
                "id": f"{identity}-{number}",
                "document": "\n".join(sentences),
                "question": one["question"],
                "choices": one["choice"],
                "answer": one["choice"].index(one["answer"]),
            }


def ccpm(text: str) -> Iterator[Row]:
    """CCPM's train.jsonl and valid.jsonl: {translation, choices, answer}; rows without an answer are left out."""
    for row in lines(text):
        if "answer" in row:
            yield {"translation": row["translation"], "choices": row["choices"], "answer": int(row["answer"])}


def race(text: str) -> Iterator[Row]:
    """RACE's files, one passage each or JSON lines of them: {article, questions, options, answers, id}."""
    passages = [json.loads(text)] if text.lstrip().startswith("{") and "\n{" not in text.strip() else list(lines(text))
    for passage in passages:
        parts = zip(passage["questions"], passage["options"], passage["answers"], strict=True)
        for number, (question, options, answer) in enumerate(parts):
            yield {
                "id": f"{passage['id']}-{number}",
                "article": passage["article"],
                "question": question,
                "choices": options,
                "answer": "ABCD".index(answer),
            }


def popqa(text: str) -> Iterator[Row]:
    """PopQA's test.tsv: `possible_answers` is a JSON list of aliases."""
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        yield {
            "id": row["id"],
            "question": row["question"],
            "answers": json.loads(row["possible_answers"]),
            "relation": row["prop"],
        }


def mmlu_redux(text: str) -> Iterator[Row]:
    """MMLU-Redux' JSON lines: {question, choices, answer, error_type}; questions flagged as wrong are left out."""
    for row in lines(text):
        if row["error_type"] == "ok":
            yield {key: row[key] for key in ("question", "choices", "answer")}


CONVERTERS: dict[str, Converter] = {
    "c3": c3,
    "ccpm": ccpm,
    "race_middle": race,
    "race_high": race,
    "popqa": popqa,
    "mmlu_redux": mmlu_redux,
}


def convert(name: str, text: str, origin: str) -> list[Row]:
    """Rows of an original file of benchmark `name`; of one without a converter, its JSON lines. Raises UserError."""
    converter = CONVERTERS.get(name, lines)
    try:
        rows = list(converter(text))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{origin}: is not a file of {name} ({type(error).__name__}: {error}); expected: {converter.__doc__}"
        ) from None
    if not rows:
        raise UserError(f"{origin}: holds no question that can be scored: give another file")
    return rows
