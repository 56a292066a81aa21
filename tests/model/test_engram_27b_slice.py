"""Real dimensions: two blocks of Engram-27B at its true widths take a training step within 16 GiB."""

import json
import subprocess
import sys

import pytest

# In a process of its own, because its peak memory is what is tested.
STEP = """
import json, math, resource, torch
from engram.config import load_config
from engram.model.transformer import Transformer
from engram.optim.clip import clip_grad_norm
from engram.optim.optimizer import build_optimizer

config = load_config("configs/paper/engram_27b.yaml")
# The leading dense block and one MoE block with memory and all 55 experts; fewer rows and tokens than the paper's.
model = config.model.replace(
    num_layers=2,
    vocab_size=16_384,
    memory=config.model.memory.replace(layer_ids=(1,), rows_per_head=(20_000, 20_000)),
)
torch.manual_seed(0)
net = Transformer(model).train()
net.compute_dtype = torch.bfloat16
optim = config.optim.replace(table=config.optim.table.replace(kind="row_adam"))
optimizer = build_optimizer(net.named_parameters(), optim)
tokens = torch.randint(0, 16_384, (1, 257))
before = {name: parameter.detach().flatten()[:64].clone() for name, parameter in net.named_parameters()}
loss = net.loss(tokens[:, :-1], tokens[:, 1:])
loss.backward()
norm = clip_grad_norm(net.parameters(), 1.0)
touched = net.blocks[1].memory.embed.weight.grad.coalesce().indices().shape[1]
missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
optimizer.step(1e-3)
optimizer.zero_grad()
with torch.no_grad():
    after = net.loss(tokens[:, :-1], tokens[:, 1:])
still = [
    name
    for name, parameter in net.named_parameters()
    if "memory.embed" not in name and "conv" not in name and torch.equal(parameter.flatten()[:64], before[name])
]
print(json.dumps({
    "loss": loss.item(), "after": after.item(), "norm": norm.item(), "missing": missing, "still": still,
    "touched": touched, "experts": model.moe.num_experts, "hidden": model.hidden_size,
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_blocks_of_engram_27b_take_a_training_step() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["experts"], result["hidden"]) == (55, 2560)
    # A fresh model knows nothing: ln 16384 = 9.70 plus the spread of its logits.
    assert 9.5 < result["loss"] < 10.8
    # One step on one sequence must lower that sequence's loss a good deal.
    assert result["after"] < result["loss"] - 0.5
    assert result["norm"] > 0 and not result["missing"] and not result["still"], result
    # 256 tokens times 16 columns at most; repeated n-grams share rows.
    assert 3500 < result["touched"] <= 4096
    assert result["peak_gib"] < 16
