"""A tiny model trained by a Backbone on several ranks, with replicated tables, and by one process."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.config import Config, parse_config
from engram.data.loader import Batch
from engram.distributed.deepspeed import Backbone
from engram.distributed.expert_parallel import shard_experts
from engram.distributed.world import World
from engram.model.transformer import IGNORE, Transformer
from engram.optim.groups import assign_roles
from engram.optim.optimizer import RoleOptimizer, build_optimizer
from engram.optim.row_adam import RowAdam
from engram.training.step import apply_gradient, compute_gradient

CPU = torch.device("cpu")
ROWS, LENGTH, MICRO = 12, 9, 2
LR = 0.003


def tiny_config(stage: int = 0, offload: bool = False, **train: Any) -> Config:
    """Every part of a model, sizes odd where they can be; clipped in every step."""
    memory = {"layer_ids": [1], "num_heads": 3, "head_dim": 3, "rows_per_head": 31, "init_std": 0.2}
    return parse_config(
        {
            "run_dir": "runs/none",
            "seed": 1,
            "model": {
                "num_layers": 2,
                "hidden_size": 16,
                "vocab_size": 61,
                "attention": {
                    "num_heads": 2,
                    "q_lora_rank": 7,
                    "kv_lora_rank": 5,
                    "qk_nope_head_dim": 6,
                    "qk_rope_head_dim": 4,
                    "v_head_dim": 6,
                },
                "moe": {"num_experts": 3, "top_k": 2, "expert_dim": 5, "sequence_balance_loss": 0.01},
                "hyper_connection": {"hc_mult": 2, "sinkhorn_steps": 3},
                "memory": {**memory, "projection_bias": True, "conv": {"zero_init": False}},
                "over_encoding": {"num_heads": 1, "head_dim": 4, "rows_per_head": 23},
                "init_std": 0.2,
            },
            "data": {"path": "runs/none", "sequence_length": LENGTH, "sources": [{"path": "runs/none"}]},
            # In the first block all streams are alike, and some gradients are nothing but rounding: a small eps would
            # make whole steps out of them.
            "optim": {"lr": LR, "eps": 1e-5, "clip_norm": 0.5, "muon": {"newton_schulz_dtype": "float32"}},
            "train": {"steps": 10, "batch_size": ROWS, "dtype": "float32", "device": "cpu", **train},
            "distributed": {"zero_stage": stage, "offload_optimizer": offload},
        }
    )


def fresh_model(config: Config, seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config.model).train()


def batch_of(step: int) -> Batch:
    """Rows of uneven numbers of targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 61, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(0, 61, (ROWS, LENGTH), generator=generator)
    targets[torch.rand(ROWS, LENGTH, generator=generator) < 0.3] = IGNORE
    return Batch(tokens, targets, None)


@dataclass
class Snapshot:
    """All that training goes on from, in whole tensors under the names of a single process."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counts: dict[str, int]


class SingleProcess:
    """What all ranks together must equal."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.config = config
        self.model = fresh_model(config, seed)
        self.optimizer: RoleOptimizer = build_optimizer(self.model.named_parameters(), config.optim)

    def gradient(self, step: int) -> tuple[float, float]:
        gradient = compute_gradient(self.model, batch_of(step), MICRO, self.config.optim.clip_norm, CPU)
        return gradient.loss, gradient.norm

    def apply(self) -> None:
        apply_gradient(self.model, self.optimizer, LR)

    def restore(self, snapshot: Snapshot) -> None:
        missing, unexpected = self.model.load_state_dict(snapshot.model, strict=False)
        assert not unexpected and all(name == "token_map" or name.endswith("router.load") for name in missing), missing
        self.optimizer.load_tensors(snapshot.optimizer)
        self.optimizer.load_scalars(snapshot.counts)

    def losses(self, steps: range) -> list[float]:
        return [(self.gradient(step)[0], self.apply())[0] for step in steps]


class RankProcess:
    """A Backbone, tables beside it whose gradients are summed over ranks, and the step that a trainer takes."""

    def __init__(
        self, world: World, config: Config, seed: int = 0, checkpointing: bool = False, persistence_threshold: int = 0
    ) -> None:
        self.world, self.config = world, config
        self.model = fresh_model(config, seed)
        self.model.activation_checkpointing = checkpointing
        assert config.distributed is not None
        shard_experts(self.model, world, config.distributed.expert_ranks)
        assignments = assign_roles(self.model.named_parameters(), config.optim)
        self.tables = [each for each in assignments if each.role == "table"]
        self.table_role = RowAdam(self.tables, config.optim.table.betas, config.optim.table.eps)
        self.backbone = Backbone(self.model, assignments, config, world, persistence_threshold=persistence_threshold)

    def gradient(self, step: int, factor: float = 1.0) -> tuple[float, float]:
        """Loss and norm of the global batch, this rank's part times a factor; leaves the clipped gradient."""
        batch = batch_of(step)
        count = int((batch.targets != IGNORE).sum())
        share = ROWS // self.world.size
        total = torch.zeros(())
        starts = range(self.world.rank * share, (self.world.rank + 1) * share, MICRO)
        for start in starts:
            tokens, targets = (part[start : start + MICRO] for part in batch[:2])
            weight = int((targets != IGNORE).sum()) / count
            loss = self.backbone.run("loss", tokens, targets, None) * (factor * weight)
            self.backbone.backward(loss, last=start == starts[-1])
            total += loss.detach()
        squares = self.backbone.squared_norm()
        for table in self.tables:
            table.parameter.grad = self._summed(table.parameter.grad)
            squares = squares + table.parameter.grad._values().double().square().sum()
        norm = squares.sqrt().item()
        if norm > self.config.optim.clip_norm:
            self.backbone.scale(self.config.optim.clip_norm / norm)
            for table in self.tables:
                table.parameter.grad._values().mul_(self.config.optim.clip_norm / norm)
        return self.world.sum(total).item(), norm

    def apply(self) -> None:
        self.backbone.step(LR)
        self.table_role.step(LR)
        for table in self.tables:
            table.parameter.grad = None
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.load"):
                self.world.sum(buffer)
        self.model.update_router_bias()

    def losses(self, steps: range) -> list[float]:
        return [(self.gradient(step)[0], self.apply())[0] for step in steps]

    def discard(self) -> None:
        self.backbone.discard()
        for table in self.tables:
            table.parameter.grad = None
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.load"):
                buffer.zero_()

    def snapshot(self) -> Snapshot:
        tables = {each.name: each.parameter.detach().clone() for each in self.tables}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name.endswith("router.bias")}
        return Snapshot(
            self.parameters() | tables | buffers,
            self.optimizer_state() | {key: tensor.clone() for key, tensor in self.table_role.tensors.items()},
            self.backbone.counts() | self.table_role.counts,
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        self.backbone.load_tensors("parameters", snapshot.model)
        self.backbone.load_tensors("optimizer", snapshot.optimizer)
        self.backbone.load_counts(snapshot.counts)
        for each in self.tables:
            each.parameter.copy_(snapshot.model[each.name])
        for key, tensor in self.table_role.tensors.items():
            tensor.copy_(snapshot.optimizer[key])
        self.table_role.counts.update({key: snapshot.counts[key] for key in self.table_role.counts})
        for name, buffer in self.model.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(snapshot.model[name])

    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.backbone.full_tensors("parameters")}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.backbone.full_tensors("optimizer")}

    def _summed(self, gradient: Tensor) -> Tensor:
        gradient = gradient.coalesce()
        parts = self.world.gather((gradient.indices(), gradient.values()))
        indices = torch.cat([indices for indices, _ in parts], dim=1)
        values = torch.cat([values for _, values in parts])
        return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False).coalesce()
