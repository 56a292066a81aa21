"""What a model must remember of the tokens so far: MLA latents, the n-grams' last tokens, the convolution's window.

Per token and layer one latent and one rotated key, whatever the number of heads (DeepSeek-V2, section 2.1). Feeding
tokens one at a time, or in parts of any size, gives the same logits as one forward pass up to rounding. What several
texts begin with is fed once: `branch` continues it in as many ways as are wanted.

Legend: B batch, T new tokens, S tokens so far with the new ones, D hidden, G streams, R query-key dimensions with
rotation, P = R / 2, L latent, E = L + R.
"""

from typing import cast

import torch
from torch import Tensor

from engram.memory.engram import Engram
from engram.model.attention import Attention
from engram.model.hyper_connection import expand
from engram.model.rope import rope_tables, table_scale
from engram.model.transformer import Block, Transformer


class LatentCache:
    """Latents and rotated keys of one attention layer, [B, max_length, L + R]."""

    def __init__(self, attention: Attention, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        config = attention.config
        self._attention = attention
        self._entries_BSE = torch.zeros(
            *shape, config.kv_lora_rank + config.qk_rope_head_dim, device=device, dtype=dtype
        )

    def attend(self, x_BTD: Tensor, start: int, rope: tuple[Tensor, Tensor], mask_TS: Tensor | None) -> Tensor:
        """Attention of the tokens at `start`, ... over all before them; their own entries are stored on the way."""
        end = start + x_BTD.shape[1]
        self._entries_BSE[:, start:end] = self._attention.entries(x_BTD, rope)
        return self._attention.over_entries(x_BTD, rope, self._entries_BSE[:, :end], mask_TS)

    def take(self, other: "LatentCache", rows_N: Tensor, length: int) -> None:
        """Begin with the first `length` entries of another cache's rows."""
        self._entries_BSE[:, :length] = other._entries_BSE[:, :length].index_select(0, rows_N)


class MemoryWindow:
    """Inputs of one memory layer as far back as its convolution reaches."""

    def __init__(self, memory: Engram) -> None:
        self._memory = memory
        self._reach = 0 if memory.conv is None else (memory.conv.weight.shape[-1] - 1) * memory.conv.dilation
        self._past: tuple[Tensor, Tensor] | None = None

    def remember(self, x_BTGD: Tensor, hash_ids_BTH: Tensor) -> Tensor:
        """The memory's output for the new tokens [B, T, G, D]."""
        new = x_BTGD.shape[1]
        if self._past is not None:
            x_BTGD = torch.cat((self._past[0], x_BTGD), dim=1)
            hash_ids_BTH = torch.cat((self._past[1], hash_ids_BTH), dim=1)
        if self._reach:
            self._past = x_BTGD[:, -self._reach :], hash_ids_BTH[:, -self._reach :]
        return self._memory(x_BTGD, hash_ids_BTH)[:, -new:]

    def take(self, other: "MemoryWindow", rows_N: Tensor) -> None:
        """Begin with what another window's rows hold."""
        if other._past is not None:
            self._past = other._past[0].index_select(0, rows_N), other._past[1].index_select(0, rows_N)


class Decoder:
    """Feeds a model its tokens in parts; holds room for `max_length` tokens of each of `batch_size` rows."""

    def __init__(self, model: Transformer, batch_size: int, max_length: int) -> None:
        config = model.config
        device, shape = model.head.weight.device, (batch_size, max_length)
        self._model = model
        self._max_length = max_length
        self._blocks = cast(list[Block], list(model.blocks))
        self._latents = [LatentCache(block.attn, shape, device, model.compute_dtype) for block in self._blocks]
        self._windows = [None if block.memory is None else MemoryWindow(block.memory) for block in self._blocks]
        tables = (config.memory, config.over_encoding)
        self._look_back = max((table.max_ngram_size - 1 for table in tables if table is not None), default=0)
        self._tokens_BS = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        frequencies, scale = model.get_buffer("rope_frequencies"), table_scale(config.attention)
        self._cos_SP, self._sin_SP = rope_tables(frequencies, max_length, scale, model.compute_dtype)

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._tokens_BS.shape[1]

    def feed(self, tokens_BT: Tensor) -> Tensor:
        """Logits after the last of the new tokens, float32 [B, vocabulary]."""
        return self._model.unembed(self.advance(tokens_BT)[:, -1:]).squeeze(1)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Normalised states of the new tokens, [B, T, D]: what the head reads."""
        return self._model.norm(self._model.merge(self.advance(tokens_BT)))

    def branch(self, rows_N: Tensor, max_length: int) -> "Decoder":
        """A decoder of its own that has been fed what the rows `rows_N` (int64, with repeats) have been fed so far."""
        other = Decoder(self._model, len(rows_N), max_length)
        other._tokens_BS = self._tokens_BS.index_select(0, rows_N)
        for mine, taken in zip(other._latents, self._latents, strict=True):
            mine.take(taken, rows_N, self.length)
        for own, window in zip(other._windows, self._windows, strict=True):
            if own is not None and window is not None:
                own.take(window, rows_N)
        return other

    def advance(self, tokens_BT: Tensor) -> Tensor:
        """The streams of the new tokens after the last block, [B, T, G, D]."""
        model, start, new = self._model, self.length, tokens_BT.shape[1]
        end = start + new
        assert end <= self._max_length, f"{end} tokens do not fit into a cache of {self._max_length}"
        self._tokens_BS = torch.cat((self._tokens_BS, tokens_BT), dim=1)
        # The tokens that the new ones' n-grams look back on.
        recent = self._tokens_BS[:, max(start - self._look_back, 0) :]
        hash_ids = {layer: ids[:, -new:] for layer, ids in model.hash_ids(recent).items()}
        rope = self._cos_SP[start:end], self._sin_SP[start:end]
        mask_TS = None
        if start and new > 1:
            mask_TS = torch.ones(new, end, dtype=torch.bool, device=tokens_BT.device).tril(diagonal=start)

        x_BTGD = expand(model.embed_tokens(recent)[:, -new:], model.config.hc_mult)
        for layer, block in enumerate(self._blocks):
            x_BTGD = self._run(block, layer, x_BTGD, hash_ids.get(layer), start, rope, mask_TS)
        return x_BTGD

    def _run(
        self,
        block: Block,
        layer: int,
        x_BTGD: Tensor,
        hash_ids_BTH: Tensor | None,
        start: int,
        rope: tuple[Tensor, Tensor],
        mask_TS: Tensor | None,
    ) -> Tensor:
        """`Block.forward` with a past."""
        x, window, latents = x_BTGD, self._windows[layer], self._latents[layer]
        if window is not None:
            assert hash_ids_BTH is not None
            if block.memory_connection is None:
                x = x + window.remember(x, hash_ids_BTH)
            else:
                x = block.memory_connection(x, lambda u: window.remember(u.unsqueeze(2), hash_ids_BTH).squeeze(2))
        x = block.attn_connection(x, lambda u: latents.attend(block.attn_norm(u), start, rope, mask_TS))
        return block.ffn_connection(x, block.feed)
