"""Write the golden files from the loops: `python -m tests.reference.write_golden`.

A golden file that changes means that addresses changed, and with them what every trained table means.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference import engram_loops as loops
from tests.reference.deepseek_tokens import deepseek_tokens

FOLDER = Path(__file__).parent.parent / "golden"

# The published sizes, and a small odd one.
RECIPES: dict[str, dict[str, Any]] = {
    "paper_27b": {
        "vocabulary_size": 99_092,
        "layer_ids": [1, 14],
        "num_heads": 8,
        "rows_per_head": [2_262_400, 2_262_400],
        "look_back": "sequence",
    },
    "v4_1": {
        "vocabulary_size": 99_092,
        "layer_ids": [1, 14],
        "num_heads": 8,
        "rows_per_head": [16_000_000, 16_000_000, 16_000_000],
        "look_back": "segment",
    },
    "ple": {
        "vocabulary_size": 248_320,
        "layer_ids": [1],
        "num_heads": 8,
        "rows_per_head": [20_000_000, 20_000_000],
        "look_back": "eos",
        "multipliers": "splitmix64",
        "seed": 1234,
        "pad_id": 248_044,
    },
    "small": {
        "vocabulary_size": 31,
        "layer_ids": [0, 3, 4],
        "num_heads": 3,
        "rows_per_head": [7, 53, 11],
        "look_back": "segment",
        "seed": 5,
    },
}


def hash_cases() -> list[dict[str, Any]]:
    cases = []
    for name, recipe in RECIPES.items():
        recipe = {"multipliers": "pcg64", "seed": 0, "pad_id": 3, **recipe}
        size, pad = recipe["vocabulary_size"], recipe["pad_id"]
        generator = random.Random(name)
        rows = [
            [0, size - 1, size - 1, size - 1, size - 1, pad, 1, 0, 0, 0, 0],
            [generator.randrange(size) for _ in range(11)],
            [pad if place == 4 else generator.randrange(size) for place in range(11)],
            [-1 if place in (2, 7) else generator.randrange(size) for place in range(11)],
        ]
        documents = [[0] * 11, [0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [0] * 5 + [1] * 6, [0] * 4 + [1] * 7]
        primes = loops.distinct_primes(len(recipe["layer_ids"]), recipe["num_heads"], recipe["rows_per_head"])
        layers = {}
        for place, layer in enumerate(recipe["layer_ids"]):
            count = len(recipe["rows_per_head"]) + 1
            multipliers = (
                loops.splitmix64_multipliers(place, count, size, recipe["seed"])
                if recipe["multipliers"] == "splitmix64"
                else loops.pcg64_multipliers(layer, count, size, recipe["seed"])
            )
            layers[layer] = {
                "multipliers": multipliers,
                "primes": primes[place],
                "num_rows": sum(map(sum, primes[place])),
                "hash_ids": [
                    loops.hash_ids(row, multipliers, primes[place], pad, recipe["look_back"], row_documents)
                    for row, row_documents in zip(rows, documents, strict=True)
                ],
            }
        cases.append({"name": name, "recipe": recipe, "ids": rows, "documents": documents, "layers": layers})
    return cases


def vocabulary_summary(texts: list[str], raw_tokens: list[str]) -> dict[str, Any]:
    table, size = loops.vocabulary_map(texts, raw_tokens)
    digest = hashlib.sha256(np.array(table, dtype="<i8").tobytes()).hexdigest()
    return {"size": size, "sha256": digest, "sample": {token: table[token] for token in range(2, len(table), 9_973)}}


def dump(name: str, content: Any) -> None:
    (FOLDER / name).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    dump("deepseek_vocabulary.json", vocabulary_summary(*deepseek_tokens()))
    dump("hash_ids.json", hash_cases())
