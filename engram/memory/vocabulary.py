"""Token ids -> compressed ids: tokens whose texts normalise alike share one id (Engram, section 2.2)."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from engram.config import UserError

_REPLACEMENT = "\ufffd"
# Private use: stands in for a lone space while the others are stripped.
_SPACE = "\ue000"


class VocabularyMap:
    """A surjection from token ids to compressed ids.

    `table` is int64 [V] with values 0 to `size`-1. Only n-gram keys are compressed; embedding and head see token ids.
    """

    def __init__(self, table: npt.ArrayLike) -> None:
        self.table = np.array(table, dtype=np.int64)
        if self.table.ndim != 1 or not self.table.size or self.table.min() < 0:
            raise UserError("a vocabulary map is a one-dimensional table of non-negative compressed ids, one per token")
        self.table.setflags(write=False)
        self.size = int(self.table.max()) + 1
        self._tables: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def from_texts(cls, texts: Sequence[str], raw_tokens: Sequence[str] | None = None) -> Self:
        """Compress by the decoded text of each id; new compressed ids in the order of first appearance.

        A text with U+FFFD is a piece of a character: its raw token, as it stands, is its key (its text without
        `raw_tokens`). A text that normalises to nothing is its own key.
        """
        if raw_tokens is not None and len(raw_tokens) != len(texts):
            raise UserError(f"{len(raw_tokens)} raw tokens were given for {len(texts)} texts: give one for each")
        normalize = _normalizer().normalize_str
        raw = texts if raw_tokens is None else raw_tokens
        keys = (raw[token] if _REPLACEMENT in text else normalize(text) or text for token, text in enumerate(texts))
        compressed: dict[str, int] = {}
        return cls([compressed.setdefault(key, len(compressed)) for key in keys])

    @classmethod
    def identity(cls, vocabulary_size: int) -> Self:
        """Every token is its own key."""
        return cls(np.arange(vocabulary_size))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and table: another digest re-addresses every row."""
        return hashlib.sha256(self.size.to_bytes(8, "little") + self.table.astype("<i8").tobytes()).hexdigest()

    def compress(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Compressed ids, int64, of the same shape. Negative (dead) ids stay; ids from V on raise IndexError."""
        table = self.table_on(token_ids.device)
        compressed = table.index_select(0, token_ids.clamp(min=0).flatten()).view(token_ids.shape)
        return torch.where(token_ids < 0, token_ids, compressed)

    def table_on(self, device: torch.device) -> torch.Tensor:
        """The table as an int64 tensor on `device`, kept there."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.table, device=device)
        return self._tables[device]


def _normalizer() -> Any:
    """The chain of DeepSeek's tokenizer compression, step by step."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )
