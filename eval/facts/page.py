"""The page of the facts: what models know of their world, and what they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engram.data.world import World
from engram.report.page import Page
from eval.facts.figures import recall_figure, sets_figure
from eval.facts.tables import Row

READING = (
    "All numbers are of a synthetic world, made by one seeded generator for training and for questions; nothing here "
    "compares with published benchmarks. Each question is a prompt that one of {towns} towns completes, so that "
    "guessing scores {chance:.3f} on every set; guessing among the towns that the prompt names scores 1/2 on "
    "context fact, 1/3 on niah and variables."
)
SETS = (
    "The key of a local fact is the last three tokens: an exact table of n-grams answers it, and nothing else. A far "
    "fact is the same with nine tokens between name and relation; paraphrases and two hops were never stated of the "
    "persons asked about. Context fact, conflict, copy, niah and variables are answered by the prompt; in a conflict "
    "the prompt contradicts a learned fact and counts as right, and `memorised` counts the learned town. Nobody can "
    "know the facts of unseen entities. `python -m eval facts --certify` shows what oracles answer."
)
DIFFERENCES = (
    "Each recipe less the baseline on the same questions. With several runs the spread between seeds is in the "
    "interval; with one run of each, the interval is of the questions alone and speaks of these two runs, not of "
    "their recipes."
)
COLLISIONS = (
    "Local facts whose n-gram shares its rows with much else in the training text, against as many facts of the same "
    "exposures whose rows are nearly their own: the most and the least crowded third of each level."
)


def build_page(
    world: World,
    subtitle: str,
    scores: Sequence[Row],
    exposures: Sequence[Row],
    differences: Sequence[Row],
    collisions: Sequence[Row],
    level: float,
    folder: Path,
) -> Page:
    """Figures `sets` and `recall` are written into `folder`."""
    chance = 1 / len(world.towns)
    page = Page("Facts of an invented world", subtitle)
    page.text(READING.format(towns=len(world.towns), chance=chance))
    page.note(
        f"Intervals at {level:.0%}: 2,000 bootstrap draws of questions, with the spread between runs where known."
    )
    page.section("Sets", SETS)
    page.figure(sets_figure(scores, chance, folder), "Accuracy with intervals; dashed: guessing. ")
    page.table(["", "set", "metric", "mean", "questions", "runs"], [_row(row) for row in scores])
    recall = recall_figure(exposures, chance, folder)
    if recall is not None:
        page.section("Exposures", "Accuracy by how often a fact is stated in the training text.")
        page.figure(recall, "Bands: intervals; dashed: guessing. ")
    if differences:
        page.section(f"Against {differences[0].baseline}", DIFFERENCES)
        header = ["", "set", "metric", "difference", "verdict", "questions", "runs"]
        page.table(header, [[*_row(row)[:4], row.verdict, *_row(row)[4:]] for row in differences])
    if collisions:
        page.section("Collisions", COLLISIONS)
        page.table(
            ["", "facts", "accuracy", "questions", "runs"],
            [[row.recipe, row.group, *_row(row)[3:]] for row in collisions],
        )
    return page


def shown(row: Row) -> str:
    """`mean (low to high)`."""
    return f"{row.interval.mean:.3f} ({row.interval.low:.3f} to {row.interval.high:.3f})"


def _row(row: Row) -> list[object]:
    return [row.recipe, row.task, row.metric.replace("_", " "), shown(row), row.questions, row.runs]
