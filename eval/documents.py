"""The texts that analyses read: whole documents of a prepared split, so that bootstraps draw documents, not tokens."""

import hashlib
from collections.abc import Sequence

from engram.config import UserError
from engram.data.shards import Dataset


def read_documents(
    dataset: Dataset, max_length: int, max_tokens: int | None = None, min_length: int = 2
) -> list[list[int]]:
    """Token ids of the split's documents in their order, each cut after `max_length`, without the end token.

    Documents of less than `min_length` tokens are left out; reading stops before `max_tokens` would be exceeded.
    Raises UserError where no document is left.
    """
    documents: list[list[int]] = []
    total = 0
    ends = [*dataset.documents.tolist()[1:], dataset.num_tokens]
    for start, end in zip(dataset.documents.tolist(), ends, strict=True):
        # The last token of a document closes it.
        length = min(end - start - 1, max_length)
        if length < min_length:
            continue
        if max_tokens is not None and total + length > max_tokens:
            break
        documents.append(dataset.window(start, length).tolist())
        total += length
    if not documents:
        limit = "" if max_tokens is None else f" within {max_tokens:,} tokens"
        raise UserError(
            f"{dataset.folder}: the {dataset.split} split has no document of at least {min_length:,} tokens{limit}: "
            "allow more tokens, or give other data"
        )
    return documents


def document_id(place: int, document: Sequence[int]) -> str:
    """Its place and a digest of its tokens: equal for two models where they read the same text in the same tokens."""
    digest = hashlib.sha256(",".join(map(str, document)).encode()).hexdigest()
    return f"document {place}:{digest[:12]}"
