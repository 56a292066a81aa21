"""Documents of a prepared split, cut and counted."""

from pathlib import Path

import pytest

from engram.config import UserError
from engram.data.shards import Dataset
from eval.documents import read_documents


def test_documents_are_the_splits_own(prepared_folder: Path) -> None:
    dataset = Dataset(prepared_folder, "validation")
    stream = dataset.window(0, dataset.num_tokens).tolist()
    whole: list[list[int]] = [[]]
    for token in stream:
        if token == dataset.eos_id:
            whole.append([])
        else:
            whole[-1].append(token)
    whole = whole[:-1]
    assert read_documents(dataset, 10**9) == whole
    assert read_documents(dataset, 7) == [document[:7] for document in whole]
    longest = max(map(len, whole))
    assert read_documents(dataset, 10**9, min_length=longest) == [doc for doc in whole if len(doc) == longest]


def test_reading_stops_at_a_number_of_tokens(prepared_folder: Path) -> None:
    dataset = Dataset(prepared_folder, "validation")
    assert [len(document) for document in read_documents(dataset, 10, max_tokens=34)] == [10, 10, 10]
    with pytest.raises(UserError, match="no document of at least 5,000 tokens within 34 tokens"):
        read_documents(dataset, 10_000, max_tokens=34, min_length=5000)
