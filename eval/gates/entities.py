"""Names in tokenised documents, as marks on their tokens."""

from collections.abc import Sequence

import numpy as np

from engram.data.tokenizer import REPLACEMENT, Tokenizer
from eval.entities import last_token, passages_of
from eval.gates.table import Entities


def mark_names(documents: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Entities:
    """Every mention of a name that `eval.entities.names_in` finds: its tokens, and the last of them.

    A name counts from the token of its first letter to the one that completes it, as far as the tokens hold it.
    """
    in_bytes = [REPLACEMENT in text for text in tokenizer.texts()]
    inside, final = [], []
    for document, passage in zip(documents, passages_of(documents, tokenizer), strict=True):
        within, last = np.zeros(len(document), bool), np.zeros(len(document), bool)
        for start, end in passage.spans:
            first, stop = (last_token(tokenizer, document, passage.text[:upto]) for upto in (start + 1, end))
            if first is not None and stop is not None:
                # A first letter in bytes is complete with the last of them.
                while first and in_bytes[document[first]] and in_bytes[document[first - 1]]:
                    first -= 1
                within[first : stop + 1] = True
                last[stop] = True
        inside.append(within)
        final.append(last)
    return Entities(np.concatenate(inside), np.concatenate(final))
