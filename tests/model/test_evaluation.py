"""Validation loss against a sum over single targets."""

from typing import Any

import pytest
import torch

from engram.config import ModelConfig
from engram.data.loader import Batch
from engram.model.evaluation import validation_loss
from engram.model.transformer import IGNORE, Transformer

CPU = torch.device("cpu")
VOCABULARY = 61


def build(**moe: Any) -> Transformer:
    attention = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        vocab_size=VOCABULARY,
        attention=attention,
        moe={"num_experts": 5, "top_k": 2, "expert_dim": 8, **moe},
        memory={"layer_ids": [1], "num_heads": 3, "head_dim": 4, "rows_per_head": 31},
    )
    return Transformer(config).train()


@pytest.fixture
def batches() -> list[Batch]:
    sizes = [(3, 11), (1, 11), (2, 7)]
    result = []
    for rows, length in sizes:
        targets = torch.randint(0, VOCABULARY, (rows, length))
        targets[0, ::3] = IGNORE
        tokens, documents = torch.randint(0, VOCABULARY, (rows, length)), torch.zeros(rows, length, dtype=torch.int64)
        result.append(Batch(tokens, targets, documents))
    return result


def test_every_target_weighs_the_same(batches: list[Batch]) -> None:
    model = build()
    found = validation_loss(model, batches, CPU)
    assert model.training and model.blocks[1].ffn.router.load.sum() == 0
    model.eval()
    scores = []
    for tokens, targets, documents in batches:
        log_probabilities = model(tokens, documents).double().log_softmax(-1)
        for row, column in (targets != IGNORE).nonzero().tolist():
            scores.append(-log_probabilities[row, column, targets[row, column]].item())
    assert len(scores) == sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    assert found == pytest.approx(sum(scores) / len(scores), rel=1e-6)


def test_a_balance_loss_does_not_count(batches: list[Batch]) -> None:
    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(3)
        losses.append(validation_loss(build(sequence_balance_loss=weight), batches, CPU))
    assert losses[0] == losses[1]
