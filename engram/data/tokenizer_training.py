"""Train a SentencePiece BPE tokenizer that loses nothing: identity normalisation, byte fallback, no dummy prefix."""

import io
import re
from collections.abc import Iterable, Iterator

from engram.data.errors import DataError
from engram.data.tokenizer import SentencePieceTokenizer

# The trainer takes a tab and U+2585 for its own marks and drops texts that hold them; U+2581 would pass for a space.
# Cut there, these characters stay what byte fallback makes of them.
_RESERVED = re.compile("[\0\t\u2581\u2585]")
# Longest text that the trainer is shown at once, in characters.
_EXCERPT = 2048
# 256 bytes, unknown, start and end.
_SMALLEST = 259


def excerpts(texts: Iterable[str], total_characters: int, wanted_characters: int) -> Iterator[str]:
    """Excerpts of at most 2,048 characters, spread evenly over the texts, that add up to the wanted share of them."""
    share = min(1.0, wanted_characters / max(1, total_characters))
    # Of each 1 / share excerpts one is taken: where the running sum of shares passes an integer.
    passed = 0.0
    for text in texts:
        for part in _RESERVED.split(text):
            for start in range(0, len(part), _EXCERPT):
                before, passed = passed, passed + share
                if int(passed + 1e-9) > int(before + 1e-9):
                    yield part[start : start + _EXCERPT]


def train_tokenizer(sentences: Iterable[str], vocab_size: int, character_coverage: float) -> SentencePieceTokenizer:
    """Train on `sentences`; ids 0, 1, 2 are <unk>, <s>, </s>, then 256 bytes, then merges, then single characters.

    The same sentences give the same file. Raises DataError where the text is too small or too varied for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size <= _SMALLEST:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but {_SMALLEST} ids go to the 256 bytes and three special tokens: "
            "raise it"
        )
    # Read before the training starts: the trainer would turn an interrupt or an error of the iterator into its own.
    sentences = list(sentences)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _EXCERPT,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _explain(message: str, vocab_size: int) -> str:
    most = re.search(r"value <= (\d+)", message)
    if most:
        return (
            f"the training text supports at most {int(most[1]):,} pieces, but model.vocab_size is {vocab_size:,}: "
            "add text or lower model.vocab_size"
        )
    least = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if least:
        return (
            f"model.vocab_size is {vocab_size:,}, but the bytes and characters of the training text alone take "
            f"{int(least[1]):,} ids: raise model.vocab_size or lower data.tokenizer.character_coverage"
        )
    return f"SentencePiece could not train a vocabulary of {vocab_size:,}: {message.strip()}"
