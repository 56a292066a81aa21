"""Collisions of n-grams against sets filled one token at a time, through the model's own hash."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from engram.memory.vocabulary import VocabularyMap
from engram.model.transformer import Transformer
from eval.gates.collisions import compressed, ngram_numbers, ngrams_on_rows
from tests.eval.models import MEMORY, build


def model_with(look_back: str, compression: bool) -> Transformer:
    changes = {
        "max_ngram_size": 4,
        "rows_per_head": 23,
        "look_back": look_back,
        "pad_id": 7,
        "compression": compression,
    }
    model = build(memory=MEMORY | changes)
    # Several tokens share a key.
    model.adopt_vocabulary(VocabularyMap([min(token, 30) for token in range(50)]))
    return model


@pytest.mark.parametrize("look_back", ["sequence", "segment", "eos"])
@pytest.mark.parametrize("compression", [True, False])
def test_counts_are_those_of_a_brute_force(look_back: str, compression: bool) -> None:
    model = model_with(look_back, compression)
    config = model.config.memory
    assert config is not None
    # Some tokens are the pad itself, where the look-back `eos` stops.
    documents = [[7 if token > 45 else token for token in torch.randint(50, (n,)).tolist()] for n in (40, 1, 25)]
    readers: dict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
    reads = []
    for document in documents:
        ids = model.hash_ids(torch.tensor([document]))[1][0].tolist()
        for t in range(len(document)):
            for column, row in enumerate(ids[t]):
                order = 2 + column // 2
                ngram, stopped = [], False
                for back in range(order):
                    key = None
                    if back <= t and not stopped:
                        token = document[t - back]
                        key = min(token, 30) if compression else token
                        stopped = back > 0 and look_back == "eos" and key == 7
                    ngram.append(7 if key is None or stopped else key)
                readers[column, row].add(tuple(ngram))
            reads.append(ids[t])
    expected = [[len(readers[column, row]) for column, row in enumerate(ids)] for ids in reads]

    tokens_N = np.concatenate([np.array(document) for document in documents])
    position_N = np.concatenate([np.arange(len(document)) for document in documents])
    keys_N, pad_key = compressed(tokens_N, config, model.vocabulary.table)
    numbers = ngram_numbers(keys_N, position_N, config.orders, pad_key, look_back == "eos")
    found = ngrams_on_rows(np.array(reads), numbers, config.num_heads)
    assert found.tolist() == expected
    assert found.max() > 2 and found.min() == 1
