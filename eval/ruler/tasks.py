"""RULER's 13 tasks in 8 groups, in NVIDIA's wording (`full`) or in a short one for small models (`tiny`).

The Engram paper speaks of 14 subsets in these 8 groups; which the 14th is, it does not say.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from engram.config import UserError
from eval.ruler import extraction, niah, questions, tracking
from eval.ruler.haystacks import Essay, read_essay
from eval.ruler.niah import Needles
from eval.ruler.questions import QuestionSet, read_hotpot, read_squad
from eval.ruler.sample import Case, Plan, Task

ProfileName = Literal["full", "tiny"]
# Names as the paper's table has them.
GROUPS = {
    "S": "single needle",
    "MK": "multi-key",
    "MV": "multi-value",
    "MQ": "multi-query",
    "VT": "variable tracking",
    "CWE": "common words",
    "FWE": "frequent words",
    "QA": "questions",
}
# Room for the answer in NVIDIA's configuration, and beyond it in the tiny one.
_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_SPARE = 8
# Keys, values or queries where there are several: what is small must fit into 128 tokens.
_MANY = {"full": 4, "tiny": 2}


@dataclass(frozen=True)
class Sources:
    """Local texts; None: invented ones, and the samples say `synthetic`."""

    essay: Essay | None = None
    squad: QuestionSet | None = None
    hotpot: QuestionSet | None = None


def read_sources(essay: Path | None, squad: Path | None, hotpot: Path | None) -> Sources:
    """Raises UserError: a file that cannot be read, or is not what it should be."""
    return Sources(
        essay=read_essay(essay) if essay else None,
        squad=read_squad(squad) if squad else None,
        hotpot=read_hotpot(hotpot) if hotpot else None,
    )


def all_tasks(profile: ProfileName, sources: Sources) -> dict[str, Task]:
    """The 13 tasks by name, in NVIDIA's order."""
    full = profile == "full"

    def task(name: str, group: str, haystack: str, plan: Callable[[Case], Plan], match: str = "all") -> Task:
        new_tokens = _NEW_TOKENS[name.split("_")[0]]
        return Task(name, group, haystack, plan, match, new_tokens if full else 0, 0 if full else _SPARE)

    tasks = []
    for name, (group, needles) in _needles(_MANY[profile]).items():
        plan = partial(niah.plan, needles=needles, wording=niah.FULL if full else niah.TINY, essay=sources.essay)
        prose = "synthetic" if sources.essay is None else "essay"
        haystack = prose if needles.haystack == "prose" else needles.haystack
        tasks.append(task(name, group, haystack, plan))
    track = partial(tracking.plan, wording=tracking.FULL if full else tracking.TINY)
    tasks.append(task("vt", "VT", "noise", track))
    listed = partial(extraction.plan_common, wording=extraction.FULL_LIST if full else extraction.TINY_LIST)
    tasks.append(task("cwe", "CWE", "words", listed))
    coded = extraction.FULL_CODED if full else extraction.TINY_CODED
    frequent = partial(extraction.plan_coded, wording=coded, room=_NEW_TOKENS["fwe"])
    tasks.append(task("fwe", "FWE", "words", frequent))
    wording = questions.FULL if full else questions.TINY
    for name, source, hops in (("qa_1", sources.squad, 1), ("qa_2", sources.hotpot, 2)):
        if source is None:
            invented = partial(questions.plan_invented, wording=wording, hops=hops)
            tasks.append(task(name, "QA", "synthetic", invented, "part"))
        else:
            read = partial(questions.plan_from_file, wording=wording, source=source)
            tasks.append(task(name, "QA", "documents", read, "part"))
    return {one.name: one for one in tasks}


def _needles(many: int) -> dict[str, tuple[str, Needles]]:
    """Group and content of the eight needle tasks."""
    return {
        "niah_single_1": ("S", Needles("noise")),
        "niah_single_2": ("S", Needles("prose")),
        "niah_single_3": ("S", Needles("prose", values="uuids")),
        "niah_multikey_1": ("MK", Needles("prose", num_keys=many)),
        "niah_multikey_2": ("MK", Needles("needles")),
        "niah_multikey_3": ("MK", Needles("needles", keys="uuids", values="uuids")),
        "niah_multivalue": ("MV", Needles("prose", num_values=many)),
        "niah_multiquery": ("MQ", Needles("prose", num_keys=many, num_queries=many)),
    }


def choose(tasks: dict[str, Task], names: Sequence[str]) -> dict[str, Task]:
    """Those of `names`, each a task or a group; all without a name. Raises UserError for an unknown one."""
    if not names:
        return tasks
    chosen: dict[str, Task] = {}
    for name in names:
        found = {key: task for key, task in tasks.items() if name in (key, task.group)}
        if not found:
            near = difflib.get_close_matches(name, [*tasks, *GROUPS], n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"RULER has no task {name!r}{hint} (tasks: {', '.join(tasks)}; groups: {', '.join(GROUPS)})"
            )
        chosen |= found
    return {name: task for name, task in tasks.items() if name in chosen}
