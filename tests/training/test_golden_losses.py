"""Losses of eight steps as the model's plain torch code gave them, before any of its operations was fused."""

import json
from pathlib import Path

import pytest
import torch

from engram.config import load_config
from engram.kernels import products
from engram.model.transformer import Transformer
from engram.optim.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/losses.json").read_text())
SMALL = (
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.moe.num_experts=8",
    "model.moe.expert_dim=32",
    "model.memory.rows_per_head=101",
    # Which matrices Muon treats apart has changed since then.
    "optim.muon=null",
)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "widen"), [("float32", 5e-4, False), ("bfloat16", 2e-3, False), ("bfloat16", 2e-3, True)]
)
def test_losses_are_those_of_plain_torch(
    dtype: str, tolerance: float, widen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_cpu_lacks_bfloat16", lambda: widen)
    config = load_config(ROOT / "configs/tiny_engram.yaml", SMALL)
    torch.manual_seed(0)
    model = Transformer(config.model).train()
    model.compute_dtype = getattr(torch, dtype)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in GOLDEN[dtype]:
        tokens = (512 ** torch.rand(2, 4, 33, generator=generator)).long().clamp_(max=511)[0]
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()
        model.update_router_bias()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[dtype], abs=tolerance)
