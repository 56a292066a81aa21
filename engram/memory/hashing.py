"""Compressed ids -> hash ids, by multipliers, primes and offsets that are drawn once (Engram, section 2.2)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
import torch

from engram.config import NgramConfig, UserError
from engram.kernels.ngram_hash import ngram_hash
from engram.memory.primes import distinct_primes
from engram.memory.vocabulary import VocabularyMap

_SEED_STRIDE = 10_007
_INT64_MAX = 2**63 - 1
_UINT64 = 2**64 - 1
# Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class NgramHash:
    """A pure function from tokens to table rows, which the model, the loader and a prefetcher may share.

    Per layer `l`: `multipliers[l]` [max_ngram_size]; `vocab_sizes[l]` [orders][heads], the rows of each head, a prime
    that serves nowhere else in any layer; `offsets[l]` [orders*heads], the first row of each head in the layer's table;
    `num_rows[l]`, the rows of that table.

    `pad_id` is a compressed id. Look-back stops at the start of the sequence and at dead tokens; besides, `segment`
    stops at the starts of documents and `eos` at the pad id itself.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        layer_ids: Sequence[int],
        max_ngram_size: int,
        num_heads: int,
        rows_per_head: Sequence[int],
        pad_id: int,
        seed: int = 0,
        multipliers: Literal["pcg64", "splitmix64"] = "pcg64",
        look_back: Literal["sequence", "segment", "eos"] = "segment",
    ) -> None:
        if not layer_ids or list(layer_ids) != sorted(set(layer_ids)):
            raise UserError(f"layer_ids are {list(layer_ids)}, but must ascend without repeats")
        if num_heads < 1 or max_ngram_size < 2 or any(rows < 2 for rows in rows_per_head):
            raise UserError(
                f"num_heads {num_heads}, max_ngram_size {max_ngram_size} and rows_per_head {list(rows_per_head)} must "
                "be at least 1, 2 and 2"
            )
        if not 0 <= pad_id < vocabulary_size:
            raise UserError(f"pad_id is {pad_id}, but compressed ids are 0 to {vocabulary_size - 1}")
        if len(rows_per_head) != max_ngram_size - 1:
            raise UserError(
                f"rows_per_head has {len(rows_per_head)} entries, but orders 2 to {max_ngram_size} need "
                f"{max_ngram_size - 1}"
            )
        self.layer_ids = tuple(layer_ids)
        self.pad_id = pad_id
        self.look_back = look_back
        draw = {"pcg64": _pcg64_multipliers, "splitmix64": _splitmix64_multipliers}[multipliers]
        self.multipliers = dict(
            zip(self.layer_ids, draw(self.layer_ids, max_ngram_size, vocabulary_size, seed), strict=True)
        )
        self.vocab_sizes = distinct_primes(self.layer_ids, rows_per_head, num_heads)
        ends = {layer: np.cumsum(sizes).tolist() for layer, sizes in self.vocab_sizes.items()}
        self.offsets: dict[int, list[int]] = {layer: [0, *end[:-1]] for layer, end in ends.items()}
        self.num_rows: dict[int, int] = {layer: end[-1] for layer, end in ends.items()}
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def from_config(cls, config: NgramConfig, vocabulary: VocabularyMap, layer_ids: Sequence[int]) -> Self:
        """The recipe of `config`, for ids that `vocabulary` compresses."""
        return cls(
            vocabulary_size=vocabulary.size,
            layer_ids=layer_ids,
            max_ngram_size=config.max_ngram_size,
            num_heads=config.num_heads,
            rows_per_head=config.rows_per_head,
            pad_id=int(vocabulary.table[config.pad_id]),
            seed=config.seed,
            multipliers=config.multipliers,
            look_back=config.look_back,
        )

    def __call__(
        self, ids: torch.Tensor, document_ids: torch.Tensor | None = None, *, token_map: torch.Tensor | None = None
    ) -> dict[int, torch.Tensor]:
        """Rows in each layer's table: {layer: int64 [B, T, orders*heads]}, -1 for dead tokens.

        `ids` are compressed ids; with `token_map` (int64 [V], `VocabularyMap.table_on`) token ids, which it compresses.
        """
        return self._columns(ids, document_ids, token_map, with_offsets=True)

    def hash(self, compressed_ids: torch.Tensor, document_ids: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
        """Rows within each head: {layer: int64 [B, T, orders*heads]}, -1 for dead tokens."""
        return self._columns(compressed_ids, document_ids, None, with_offsets=False)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides an address: a model trained under another one reads other rows."""
        recipe = [self.layer_ids, self.multipliers, self.vocab_sizes, self.pad_id, self.look_back]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def _columns(
        self,
        ids: torch.Tensor,
        document_ids: torch.Tensor | None,
        token_map: torch.Tensor | None,
        with_offsets: bool,
    ) -> dict[int, torch.Tensor]:
        multipliers, primes, offsets = self._constants_on(ids.device)
        hash_ids = ngram_hash(
            ids,
            document_ids if self.look_back == "segment" else None,
            multipliers,
            primes,
            offsets if with_offsets else None,
            pad_id=self.pad_id,
            stop_at_pad=self.look_back == "eos",
            token_map=token_map,
        )
        return dict(zip(self.layer_ids, hash_ids.unbind(), strict=True))

    def _constants_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if device not in self._constants:
            multipliers, primes, offsets = (
                torch.tensor([values[layer] for layer in self.layer_ids], dtype=torch.int64, device=device)
                for values in (self.multipliers, self.vocab_sizes, self.offsets)
            )
            self._constants[device] = multipliers, primes, offsets
        return self._constants[device]


def _pcg64_multipliers(layer_ids: Sequence[int], count: int, vocabulary_size: int, seed: int) -> Iterator[list[int]]:
    """Odd multipliers as DeepSeek draws them: no product with an id reaches 2^63."""
    bound = _INT64_MAX // vocabulary_size // 2
    for layer in layer_ids:
        generator = np.random.default_rng(seed + _SEED_STRIDE * layer)
        yield (generator.integers(0, bound, size=count, dtype=np.int64) * 2 + 1).tolist()


def _splitmix64_multipliers(
    layer_ids: Sequence[int], count: int, vocabulary_size: int, seed: int
) -> Iterator[list[int]]:
    """Odd multipliers as Qwen3.8-Flash-Next draws them: its layers are numbered by their place among memory layers."""
    bound = _INT64_MAX // vocabulary_size // 2
    for place in range(len(layer_ids)):
        base = seed + _SEED_STRIDE * place
        yield [2 * (_splitmix64(base + _GOLDEN_GAMMA * index) % bound) + 1 for index in range(1, count + 1)]


def _splitmix64(value: int) -> int:
    value = (value + _GOLDEN_GAMMA) & _UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)
