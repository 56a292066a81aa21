"""The language model: tokens -> logits, readable in two forwards.

Legend: B batch, T tokens, G residual streams, D hidden, V vocabulary, H n-gram columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram.config import ModelConfig, NgramConfig
from engram.kernels.linear_cross_entropy import linear_cross_entropy, token_cross_entropy
from engram.memory.engram import Engram
from engram.memory.hashing import NgramHash
from engram.memory.over_encoding import OverEncoding
from engram.memory.table import RowTable
from engram.memory.vocabulary import VocabularyMap
from engram.model.attention import Attention
from engram.model.ffn import FeedForward
from engram.model.hyper_connection import HyperConnection, Readout, ResidualConnection, expand
from engram.model.init import init_weights
from engram.model.linear import Linear
from engram.model.moe import MoE
from engram.model.norm import RMSNorm
from engram.model.rope import inverse_frequencies, rope_tables, table_scale

IGNORE = -100


class Block(nn.Module):
    """Memory, attention and feed-forward, each added to the residual streams."""

    def __init__(self, config: ModelConfig, layer_id: int, num_rows: int | None) -> None:
        super().__init__()
        single = config.memory is not None and config.memory.fusion == "single"
        self.memory: Engram | None = None
        self.memory_connection: nn.Module | None = None
        if config.memory and num_rows is not None:
            streams = 1 if single else config.hc_mult
            self.memory = Engram(
                config.memory, layer_id=layer_id, hidden_size=config.hidden_size, hc_mult=streams, num_rows=num_rows
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

    def forward(
        self, x_BTGD: Tensor, hash_ids_BTH: Tensor | None, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        x = x_BTGD
        if self.memory is not None:
            x = self._remember(x, hash_ids_BTH)
        x = self.attn_connection(x, lambda u: self.attend(u, rope, mask))
        return self.ffn_connection(x, self.feed)

    def attend(self, u_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        return self.attn(self.attn_norm(u_BTD), rope, mask)

    def feed(self, u_BTD: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(u_BTD))

    def _remember(self, x: Tensor, hash_ids: Tensor | None) -> Tensor:
        assert self.memory is not None
        if self.memory_connection is None:
            return x + self.memory(x, hash_ids)
        memory = self.memory
        return self.memory_connection(x, lambda u: memory(u.unsqueeze(2), hash_ids).squeeze(2))


def _connection(config: ModelConfig, index: int) -> nn.Module:
    if config.hyper_connection is None:
        return ResidualConnection()
    return HyperConnection(config.hyper_connection, config.hidden_size, config.norm_eps, index)


def _compile(module: nn.Module, *methods: str) -> None:
    for method in methods:
        setattr(module, method, torch.compile(getattr(module, method)))


class Transformer(nn.Module):
    """Parameters are float32; everything between embedding and logits runs in `compute_dtype`.

    `vocabulary` maps token ids to the compressed ids whose n-grams are hashed; None is the identity. The map travels
    with the weights, because another map addresses other rows.
    """

    token_map: Tensor
    rope_frequencies: Tensor

    def __init__(self, model: ModelConfig, vocabulary: VocabularyMap | None = None) -> None:
        super().__init__()
        self.config = model
        self._identity = VocabularyMap.identity(model.vocab_size)
        self.vocabulary = vocabulary or self._identity
        if len(self.vocabulary.table) != model.vocab_size:
            raise ValueError(
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
        self.blocks = nn.ModuleList(Block(model, layer, num_rows.get(layer)) for layer in range(model.num_layers))
        self.readout = (
            Readout(model.hyper_connection, model.hidden_size, model.norm_eps) if model.hyper_connection else None
        )
        self.norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.head = Linear(model.hidden_size, model.vocab_size)

        self.register_buffer("token_map", torch.tensor(self.vocabulary.table))
        self.register_buffer("rope_frequencies", inverse_frequencies(model.attention), persistent=False)
        init_weights(self, model)

    def forward(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits float32 [B, T, V]. `document_ids` int64 [B, T] isolates look-back and, if configured, attention."""
        return self.head(self.hidden(tokens_BT, document_ids)).float()

    def hidden(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Normalised final state [B, T, D] in the compute dtype: what the head reads."""
        hash_ids = self.hash_ids(tokens_BT, document_ids)
        rope, mask = self._positions(tokens_BT, document_ids)
        x_BTGD = expand(self._embed(tokens_BT, document_ids), self.config.hc_mult)
        for layer, block in enumerate(self.blocks):
            x_BTGD = self._run(block, x_BTGD, hash_ids.get(layer), rope, mask)
        x_BTD = self.readout(x_BTGD) if self.readout is not None else x_BTGD.squeeze(2)
        return self.norm(x_BTD)

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over targets that are not -100, in nats; in training mode plus the balance losses."""
        x_BTD = self.hidden(tokens, document_ids)
        loss = linear_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets.flatten(), compiled=self._compiled)
        loss = loss / (targets != IGNORE).sum().clamp(min=1)
        for layer in self._moe_layers():
            if self.training and layer.balance_loss is not None:
                loss = loss + layer.balance_loss
        return loss

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of each target, float32 [B, T]; 0 where the target is -100. Without a gradient."""
        x_BTD = self.hidden(tokens, document_ids)
        return token_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets.flatten()).view_as(targets)

    def hash_ids(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> dict[int, Tensor]:
        """Table rows int64 [B, T, H] that each memory layer reads: a pure function of the tokens."""
        if self.hasher is None:
            return {}
        assert self.config.memory is not None
        return self.hasher(self._keys(self.config.memory).compress(tokens_BT), document_ids)

    def _keys(self, tables: NgramConfig) -> VocabularyMap:
        """The map whose ids are hashed."""
        return self.vocabulary if tables.compression else self._identity

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """Loss-free balancing, once after each optimizer step."""
        for layer in self._moe_layers():
            layer.router.update_bias()

    def set_dense_table_gradients(self, dense: bool) -> None:
        """Whether table gradients are as large as the tables (`dense_adam`) or sparse."""
        for table in self.tables():
            table.dense_gradients = dense

    def tables(self) -> list[RowTable]:
        return [module for module in self.modules() if isinstance(module, RowTable)]

    def compile_blocks(self) -> None:
        """Compile the parts between matrix products. Blocks share them, so depth costs no compilation."""
        self._compiled = True
        for module in self.modules():
            match module:
                case Block():
                    _compile(module, "attend", "feed")
                case HyperConnection():
                    _compile(module, "read", "write")
                case Engram():
                    _compile(module, "fuse")

    def _moe_layers(self) -> list[MoE]:
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def _embed(self, tokens_BT: Tensor, document_ids: Tensor | None) -> Tensor:
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
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
