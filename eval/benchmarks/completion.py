"""Scores of a completion that has one right text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def process_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`acc`: greedy decoding writes the answer; `bits_per_byte` of the answer with its leading space."""
    logprob, greedy = results[0]
    size = len(f" {doc['answers'][0]}".encode())
    return {"acc": float(greedy), "bits_per_byte": -logprob / math.log(2) / size}
