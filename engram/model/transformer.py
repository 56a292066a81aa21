"""The language model: tokens -> logits, readable in two forwards.

Legend: B batch, T tokens, G residual streams, D hidden, V vocabulary, H n-gram columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram.config import ModelConfig, NgramConfig, UserError
from engram.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy, token_cross_entropy
from engram.memory.engram import Engram
from engram.memory.hashing import NgramHash
from engram.memory.mapped_table import MappedTable
from engram.memory.over_encoding import OverEncoding
from engram.memory.staged_table import StagedTable
from engram.memory.table import RowTable
from engram.memory.vocabulary import VocabularyMap
from engram.model.attention import Attention
from engram.model.ffn import FeedForward
from engram.model.hyper_connection import HyperConnection, Readout, ResidualConnection, expand
from engram.model.init import init_weights
from engram.model.linear import Linear
from engram.model.moe import MoE, Routed
from engram.model.norm import RMSNorm
from engram.model.rope import inverse_frequencies, rope_tables, table_scale


class Block(nn.Module):
    """Memory, attention and feed-forward, each added to the residual streams."""

    def __init__(
        self,
        config: ModelConfig,
        layer_id: int,
        num_rows: int | None,
        table: Callable[..., RowTable | StagedTable | MappedTable],
    ) -> None:
        super().__init__()
        single = config.memory is not None and config.memory.fusion == "single"
        self.memory: Engram | None = None
        self.memory_connection: nn.Module | None = None
        if config.memory and num_rows is not None:
            streams = 1 if single else config.hc_mult
            self.memory = Engram(
                config.memory,
                layer_id=layer_id,
                hidden_size=config.hidden_size,
                hc_mult=streams,
                num_rows=num_rows,
                table=table,
            )
            if single:
                self.memory_connection = _connection(config, layer_id)
        self.attn_connection = _connection(config, 2 * layer_id)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config.attention, config.hidden_size, config.norm_eps)
        self.ffn_connection = _connection(config, 2 * layer_id + 1)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: nn.Module
        if config.moe and config.is_moe_layer(layer_id):
            self.ffn = MoE(config.moe, config.hidden_size)
        else:
            self.ffn = FeedForward(config.hidden_size, config.dense_width)
        # On during the model's own forward pass: a checkpointed block runs again in the backward pass, and must not
        # count its experts' loads or leave a loss a second time.
        self.recording = False
        # Whether what stands between matrix products is compiled.
        self.compiled = False
        self.balance_loss: Tensor | None = None

    def forward(
        self, x_BTGD: Tensor, hash_ids_BTH: Tensor | None, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        x = x_BTGD
        if self.memory is not None:
            x = self._remember(x, hash_ids_BTH)
        x = self.attn_connection(x, lambda u: self.attend(u, rope, mask))
        return self.ffn_connection(x, self.feed)

    def attend(self, u_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        run = _compiled(_attend) if self.compiled else _attend
        return run(self, u_BTD, rope, mask)

    def feed(self, u_BTD: Tensor) -> Tensor:
        fed = (_compiled(_feed) if self.compiled else _feed)(self, u_BTD)
        if isinstance(fed, Tensor):
            return fed
        if self.recording and fed.load is not None:
            assert isinstance(self.ffn, MoE)
            self.ffn.router.load += fed.load
            self.balance_loss = fed.balance_loss
        return fed.output

    def _remember(self, x: Tensor, hash_ids: Tensor | None) -> Tensor:
        assert self.memory is not None
        if self.memory_connection is None:
            return x + self.memory(x, hash_ids)
        memory = self.memory
        return self.memory_connection(x, lambda u: memory(u.unsqueeze(2), hash_ids).squeeze(2))


def _attend(block: Block, u_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    return block.attn(block.attn_norm(u_BTD), rope, mask)


def _feed(block: Block, u_BTD: Tensor) -> Tensor | Routed:
    return block.ffn(block.ffn_norm(u_BTD))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shared by all blocks, so that depth costs no compilation; bound to none, so that copies run their own weights."""
    return torch.compile(function)


def _connection(config: ModelConfig, index: int) -> nn.Module:
    if config.hyper_connection is None:
        return ResidualConnection()
    return HyperConnection(config.hyper_connection, config.hidden_size, config.norm_eps, index)


def _adopt_vocabulary(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The map travels with the weights: under another one, they would be read at other rows."""
    assert isinstance(model, Transformer)
    saved = state.get(prefix + "token_map")
    if saved is None or saved.shape != model.token_map.shape or saved.is_meta:
        return
    if not np.array_equal(saved.cpu().numpy(), model.vocabulary.table):
        model.adopt_vocabulary(VocabularyMap(saved.cpu().numpy()))


class Transformer(nn.Module):
    """Parameters are float32; everything between embedding and logits runs in `compute_dtype`.

    `vocabulary` maps token ids to the compressed ids whose n-grams are hashed; None is the identity. The map travels
    with the weights, because another map addresses other rows. `table` makes each memory layer's table, of RowTable's
    arguments.
    """

    token_map: Tensor
    rope_frequencies: Tensor

    def __init__(
        self,
        model: ModelConfig,
        vocabulary: VocabularyMap | None = None,
        table: Callable[..., RowTable | StagedTable | MappedTable] = RowTable,
    ) -> None:
        super().__init__()
        self.config = model
        self._identity = VocabularyMap.identity(model.vocab_size)
        self.vocabulary = vocabulary or self._identity
        if len(self.vocabulary.table) != model.vocab_size:
            raise UserError(
                f"the vocabulary map covers {len(self.vocabulary.table)} token ids, but model.vocab_size is "
                f"{model.vocab_size}: make them equal"
            )
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        self._compiled = False

        self.embed = nn.Embedding(model.vocab_size, model.hidden_size)
        self.over_encoding = (
            OverEncoding(model.over_encoding, hidden_size=model.hidden_size, vocabulary=self._keys(model.over_encoding))
            if model.over_encoding
            else None
        )
        self.hasher = (
            NgramHash.from_config(model.memory, self._keys(model.memory), model.memory.layer_ids)
            if model.memory
            else None
        )
        num_rows = self.hasher.num_rows if self.hasher else {}
        self.blocks = nn.ModuleList(
            Block(model, layer, num_rows.get(layer), table) for layer in range(model.num_layers)
        )
        self.readout = (
            Readout(model.hyper_connection, model.hidden_size, model.norm_eps) if model.hyper_connection else None
        )
        self.norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.head = Linear(model.hidden_size, model.vocab_size)

        self.register_buffer("token_map", torch.tensor(self.vocabulary.table))
        self.register_buffer("rope_frequencies", inverse_frequencies(model.attention), persistent=False)
        init_weights(self, model)
        self.register_load_state_dict_pre_hook(_adopt_vocabulary)

    def forward(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits float32 [B, T, V]. `document_ids` int64 [B, T] isolates look-back and, if configured, attention."""
        return self.head(self.hidden(tokens_BT, document_ids)).float()

    def hidden(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Normalised final state [B, T, D] in the compute dtype: what the head reads."""
        hash_ids = self.hash_ids(tokens_BT, document_ids)
        rope, mask = self._positions(tokens_BT, document_ids)
        x_BTGD = expand(self.embed_tokens(tokens_BT, document_ids), self.config.hc_mult)
        for layer, block in enumerate(self.blocks):
            x_BTGD = self._run(block, x_BTGD, hash_ids.get(layer), rope, mask)
        return self.norm(self.merge(x_BTGD))

    def merge(self, x_BTGD: Tensor) -> Tensor:
        """The streams as one state [B, T, D], the way the head's norm reads them."""
        return self.readout(x_BTGD) if self.readout is not None else x_BTGD.squeeze(2)

    def unembed(self, x_BTGD: Tensor) -> Tensor:
        """Logits float32 [B, T, V] of the streams at any depth: the model's own merge, norm and head (LogitLens)."""
        return self.head(self.norm(self.merge(x_BTGD))).float()

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over targets that are not -100, in nats; in training mode plus the balance losses."""
        x_BTD = self.hidden(tokens, document_ids)
        loss = linear_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets.flatten(), compiled=self._compiled)
        loss = loss / (targets != IGNORE).sum().clamp(min=1)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.balance_loss is not None:
                loss, block.balance_loss = loss + block.balance_loss, None
        return loss

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of each target, float32 [B, T]; 0 where the target is -100. Without a gradient."""
        x_BTD = self.hidden(tokens, document_ids)
        return token_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets.flatten()).view_as(targets)

    def adopt_vocabulary(self, vocabulary: VocabularyMap) -> None:
        """Hash by another map of the same length. Tables keep their sizes: multipliers and the pad id follow it."""
        self.vocabulary = vocabulary
        memory = self.config.memory
        if memory is not None:
            self.hasher = NgramHash.from_config(memory, self._keys(memory), memory.layer_ids)
        if self.over_encoding is not None:
            config = self.over_encoding.config
            self.over_encoding.hasher = NgramHash.from_config(config, self._keys(config), layer_ids=(0,))

    def hash_ids(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> dict[int, Tensor]:
        """Table rows int64 [B, T, H] that each memory layer reads: a pure function of the tokens."""
        if self.hasher is None:
            return {}
        assert self.config.memory is not None
        keys = self._keys(self.config.memory)
        return self.hasher(tokens_BT, document_ids, token_map=keys.table_on(tokens_BT.device))

    def _keys(self, tables: NgramConfig) -> VocabularyMap:
        """The map whose ids are hashed."""
        return self.vocabulary if tables.compression else self._identity

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """Loss-free balancing, once after each optimizer step."""
        for layer in self._moe_layers():
            layer.router.update_bias()

    def forget_router_loads(self) -> None:
        """Count no choices of the step that is not taken."""
        for layer in self._moe_layers():
            layer.router.load.zero_()

    def set_dense_table_gradients(self, dense: bool) -> None:
        """Whether table gradients are as large as the tables (`dense_adam`) or sparse."""
        for table in self.tables():
            table.dense_gradients = dense

    def tables(self) -> list[RowTable | StagedTable]:
        return [module for module in self.modules() if isinstance(module, RowTable | StagedTable)]

    def compile_blocks(self) -> None:
        """Compile attention and feed-forward; memory and hyper-connections are fused operations already."""
        self._compiled = True
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = True

    def _moe_layers(self) -> list[MoE]:
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def embed_tokens(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What the first block reads, [B, T, D] in the compute dtype: with over-encoding, n-grams averaged in."""
        x_BTD = self.embed(tokens_BT)
        if self.over_encoding is not None:
            keys = self._keys(self.over_encoding.config)
            x_BTD = self.over_encoding(x_BTD, keys.compress(tokens_BT), document_ids)
        return x_BTD.to(self.compute_dtype)

    def _positions(self, tokens_BT: Tensor, document_ids: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        length = tokens_BT.shape[1]
        rope = rope_tables(self.rope_frequencies, length, table_scale(self.config.attention), self.compute_dtype)
        if document_ids is None or not self.config.attention.isolate_documents:
            return rope, None
        same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).tril()
        return rope, (same & causal).unsqueeze(1)

    def _run(self, block: nn.Module, *inputs: object) -> Tensor:
        assert isinstance(block, Block)
        block.recording = True
        try:
            if self.activation_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            return block(*inputs)
        finally:
            block.recording = False
