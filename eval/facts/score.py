"""What a model answers: log-probabilities of all towns behind each prompt.

| metric | of one question |
|---|---|
| `accuracy` | 1 where the right town is the likeliest of all towns; chance is 1 / V |
| `margin` | log P(right town) - log P(likeliest wrong town), nats: moves long before accuracy does |
| `bits_per_byte` | of the right town with the space before it |
| `cloze` | 1 where the right town is the likeliest continuation of all |
| `memorised` | where the prompt contradicts a learned fact: 1 where the learned town is the likeliest of all towns |

Legend: N questions, V towns.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from engram.config import Config, UserError
from engram.data.world import World, build_world
from eval.facts.questions import KINDS, NAMED_CHANCE, SETS, Question, ask
from eval.loading import Loaded
from eval.results import Item
from eval.scoring import Request, score
from eval.sensitivity.retained import Suite


def world_of(config: Config) -> World:
    """The world that a model was trained on. Raises UserError where there was none, or more than one."""
    found = [source.world for source in config.data.sources if source.world is not None]
    if len(found) != 1:
        sources = ", ".join(str(source.name or source.path or "a world") for source in config.data.sources)
        raise UserError(
            f"{config.run_dir}: was trained on {sources}: facts are asked of models that were trained on one world "
            "of invented facts; train configs/facts_engram.yaml, or add `- world: {}` to data.sources"
        )
    return build_world(found[0])


def facts_items(
    loaded: Loaded,
    world: World | None = None,
    sets: Sequence[str] = SETS,
    *,
    advance: Callable[[int], None] | None = None,
) -> list[Item]:
    """Every metric of every question of the sets; a question's id is the same for every model of the world.

    `world` None: the one that the model was trained on. `advance` is told how many answers were scored (a question has
    one for each town). The model is asked as it is: without its memory inside
    `eval.sensitivity.interventions.intervened`.

    Raises UserError: not trained on a world, or a prompt longer than the training's sequences.
    """
    world = world or world_of(loaded.config)
    asked = ask(world, tuple(sets))
    encode = loaded.tokenizer.encode_batch
    towns = [tuple(ids) for ids in encode([f" {town}" for town in world.towns])]
    prompts = [tuple(ids) for ids in encode([question.prompt for question in asked])]
    requests = [Request(prompt, town) for prompt in prompts for town in towns]
    found = score(loaded.model, requests, max_length=loaded.config.data.sequence_length, advance=advance)
    logprobs_NV = np.array([one.logprob for one in found]).reshape(len(asked), len(towns))
    greedy_NV = np.array([one.greedy for one in found]).reshape(len(asked), len(towns))
    return [
        Item(question.task, question.id, metric, value, question.group)
        for question, logprobs, greedy in zip(asked, logprobs_NV, greedy_NV, strict=True)
        for metric, value in _metrics(question, logprobs, bool(greedy[question.gold]), world).items()
    ]


def facts_suite(loaded: Loaded) -> Suite:
    """The sets as `python -m eval sensitivity` asks them. Raises UserError as `facts_items` does."""
    world = world_of(loaded.config)
    chance = {name: max(1 / len(world.towns), NAMED_CHANCE.get(name, 0.0)) for name in SETS}
    return Suite("facts", partial(facts_items, world=world), "accuracy", chance, KINDS)


def _metrics(question: Question, logprobs_V: np.ndarray, greedy: bool, world: World) -> dict[str, float]:
    gold, likeliest = question.gold, int(logprobs_V.argmax())
    size = len(f" {world.towns[gold]}".encode())
    found = {
        "accuracy": float(likeliest == gold),
        "margin": float(logprobs_V[gold] - np.delete(logprobs_V, gold).max()),
        "bits_per_byte": float(-logprobs_V[gold] / math.log(2) / size),
        "cloze": float(greedy),
    }
    return found if question.memorised is None else found | {"memorised": float(likeliest == question.memorised)}
