"""Questions about one or two of many documents: SQuAD and HotpotQA from local files, or invented people.

Wording of the `full` profile, and how documents are chosen: NVIDIA's RULER (Apache-2.0).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from engram.config import UserError
from eval.ruler.haystacks import prose
from eval.ruler.sample import Case, Draft, Plan

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Wording:
    template: str
    answer_prefix: str
    document: str
    separator: str
    # Sentences of prose in a document about an invented person.
    filler: int


FULL = Wording(
    template=(
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only "
        "give me the answer and do not output any other words.\n\nQuestion: {query}"
    ),
    answer_prefix=" Answer:",
    document="Document {i}:\n{document}",
    separator="\n\n",
    filler=4,
)
TINY = Wording(
    template="{context}\nQuestion: {query}", answer_prefix=" Answer:", document="{document}", separator="\n", filler=0
)


@dataclass(frozen=True)
class Question:
    """`outputs` are aliases; `documents` answer it, `near` are of the same article. Both are places in the data set."""

    query: str
    outputs: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    sha256: str


def read_squad(path: Path) -> QuestionSet:
    """SQuAD 2.0's JSON; questions without an answer are left out. Raises UserError: not this format."""
    tree, digest = _read_json(path)
    try:
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in tree["data"]]
        texts = sorted({text for article in articles for text in article})
        place = {text: index for index, text in enumerate(texts)}
        questions = []
        for article in tree["data"]:
            every = [place[paragraph["context"]] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = place[paragraph["context"]]
                near = tuple(dict.fromkeys(other for other in every if other != own))
                for asked in paragraph["qas"]:
                    if not asked.get("is_impossible"):
                        outputs = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                        questions.append(Question(asked["question"], outputs, (own,), near))
    except (LookupError, TypeError) as error:
        raise UserError(f"{path}: is not SQuAD's JSON ({error!r} in it): give dev-v2.0.json with --squad") from None
    return QuestionSet(tuple(questions), tuple(texts), digest)


def read_hotpot(path: Path) -> QuestionSet:
    """HotpotQA's JSON (distractor setting). Raises UserError: not this format."""
    tree, digest = _read_json(path)
    try:
        found = [[f"{title}\n{''.join(parts)}" for title, parts in one["context"]] for one in tree]
        texts = sorted({text for documents in found for text in documents})
        place = {text: index for index, text in enumerate(texts)}
        questions = [
            Question(one["question"], (one["answer"],), tuple(dict.fromkeys(place[text] for text in documents)))
            for one, documents in zip(tree, found, strict=True)
        ]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is not HotpotQA's JSON ({error!r} in it): give hotpot_dev_distractor_v1.json with --hotpot"
        ) from None
    return QuestionSet(tuple(questions), tuple(texts), digest)


def plan_from_file(case: Case, wording: Wording, source: QuestionSet) -> Plan:
    """Sizes count documents: those of the question, then of its article, then of any. Raises UserError: no question."""
    if case.index >= len(source.questions):
        raise UserError(
            f"sample {case.index} is asked for, but the file has {len(source.questions):,} questions: lower --samples"
        )
    random, question = case.random, source.questions[case.index]
    own = {*question.documents, *question.near}
    others = [place for place in range(len(source.documents)) if place not in own]
    order = [
        *question.documents,
        *random.sample(question.near, len(question.near)),
        *random.sample(others, len(others)),
    ]
    seed = random.getrandbits(64)

    def build(size: int) -> Draft:
        documents = [source.documents[place] for place in order[:size]]
        Random(seed).shuffle(documents)
        return _draft(wording, documents, question.query, question.outputs)

    return Plan(build, smallest=len(question.documents), largest=len(order))


def plan_invented(case: Case, wording: Wording, hops: int) -> Plan:
    """Sizes count other people's documents. With two hops, the town is told of whom the first document names."""
    random, taken = case.random, set[str]()
    sentences = prose(random, None)
    name, employer, town = (_invent(random, taken) for _ in range(3))
    first = f"{name} works for {employer}." if hops == 2 else f"{name} lives in {town}."
    told = [first, f"{employer} lives in {town}."][:hops]
    query = f"In which town does the employer of {name} live?" if hops == 2 else f"In which town does {name} live?"
    source, seed = Random(random.getrandbits(64)), random.getrandbits(64)
    others: list[str] = []

    def build(size: int) -> Draft:
        while len(others) < size:
            who, other, where = (_invent(source, taken) for _ in range(3))
            works = hops == 2 and len(others) % 2
            others.append(f"{who} works for {other}." if works else f"{who} lives in {where}.")
        texts = told + others[:size]
        filler = sentences(wording.filler * len(texts))
        documents = [
            " ".join([text, *filler[wording.filler * i : wording.filler * (i + 1)]]) for i, text in enumerate(texts)
        ]
        Random(seed).shuffle(documents)
        return _draft(wording, documents, query, (town,), tuple(told))

    return Plan(build, smallest=1)


def _draft(
    wording: Wording, documents: Sequence[str], query: str, outputs: tuple[str, ...], marks: tuple[str, ...] = ()
) -> Draft:
    shown = [wording.document.format(i=i, document=document) for i, document in enumerate(documents, start=1)]
    text = wording.template.format(context=wording.separator.join(shown), query=query)
    return Draft(text, wording.answer_prefix, outputs, outputs[0], marks)


def _invent(random: Random, taken: set[str]) -> str:
    while (name := "".join(random.choice(each) for each in (_CONSONANTS, _VOWELS) * 3).capitalize()) in taken:
        pass
    taken.add(name)
    return name


def _read_json(path: Path) -> tuple[Any, str]:
    try:
        data = path.read_bytes()
        return json.loads(data), hashlib.sha256(data).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): give another file") from None
