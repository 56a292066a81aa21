from collections.abc import Callable

import pytest
import torch

from engram.config import Config
from engram.data.loader import Batch
from engram.model.transformer import IGNORE, Transformer
from engram.training.evaluation import validation_loss

CPU = torch.device("cpu")


@pytest.fixture
def batches() -> list[Batch]:
    sizes = [(3, 11), (1, 11), (2, 7)]
    result = []
    for rows, length in sizes:
        targets = torch.randint(0, 384, (rows, length))
        targets[0, ::3] = IGNORE
        tokens, documents = torch.randint(0, 384, (rows, length)), torch.zeros(rows, length, dtype=torch.int64)
        result.append(Batch(tokens, targets, documents))
    return result


def test_every_target_weighs_the_same(make_config: Callable[..., Config], batches: list[Batch]) -> None:
    model = Transformer(make_config().model).train()
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


def test_a_balance_loss_does_not_count(make_config: Callable[..., Config], batches: list[Batch]) -> None:
    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(3)
        model = Transformer(make_config(model={"moe": {"sequence_balance_loss": weight}}).model).train()
        losses.append(validation_loss(model, batches, CPU))
    assert losses[0] == losses[1]
