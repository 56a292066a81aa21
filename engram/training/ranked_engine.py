"""One model on several ranks: DeepSpeed holds the backbone, tables are outside of it; a step is that of one process.

Gradients are summed, never averaged: each rank's loss is weighted by its share of the whole batch's targets.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from engram.config import Config
from engram.distributed.deepspeed import Backbone
from engram.distributed.expert_parallel import shard_experts, sum_router_loads
from engram.distributed.replicated_tables import sum_table_gradients
from engram.distributed.row_ranges import row_ranges
from engram.distributed.world import World
from engram.model.evaluation import TokenBatch, loss_sums
from engram.model.transformer import Transformer
from engram.optim.groups import assign_roles, roles_table
from engram.optim.optimizer import RoleOptimizer, table_role
from engram.training.checkpoint import Checkpoint
from engram.training.evaluation_share import share_of
from engram.training.staged import StagedRows
from engram.training.statistics import layer_statistics
from engram.training.step import Gradient, merge_table_gradients, number_of_targets, weighted_micro_batches
from engram.training.stored_tables import StoredTables
from engram.training.tensor_files import bounded_files, row_slices


class RankedEngine:
    """`Engine` on all ranks of a world."""

    def __init__(
        self, model: Transformer, config: Config, device: torch.device, world: World, stored: StoredTables
    ) -> None:
        """`stored` has made the model's memory tables."""
        self.model = model
        self.config = config
        self.device = device
        self.world = world
        assert config.distributed is not None
        settings = config.distributed
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()} | stored.shapes()
        shard_experts(model, world, settings.expert_ranks, settings.timeout_seconds)
        assignments = assign_roles(model.named_parameters(), config.optim, parts=stored.parts())
        # DeepSpeed leaves empty parameters behind.
        self._roles_table = roles_table(assignments)
        tables = [each for each in assignments if each.role == "table"]
        self._tables = {each.name: each.parameter for each in tables}
        self._table_optimizer = RoleOptimizer(tables, [table_role(tables, config.optim.table)])
        stored.bind(self._table_optimizer.tensors())
        self._stored = stored
        self._rows = StagedRows(model, stored.steps, device)
        self.backbone = Backbone(model, assignments, config, world)
        self._micro_batch_size = config.train.micro_batch_size or config.train.batch_size // world.size

    # --------------------------------------------------------------------------------------------------------- one step

    def compute_gradient(self, batch: TokenBatch, following: Callable[[], TokenBatch] | None = None) -> Gradient:
        self._rows.begin(batch, following)
        loss = self.world.sum(self._accumulate(batch))
        self._rows.finish()
        sum_table_gradients((table for name, table in self._tables.items() if self._is_whole(name)), self.world)
        norm = self._norm()
        loss_value, norm_value = torch.stack((loss.double(), norm)).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        clip_norm = self.config.optim.clip_norm
        if finite and clip_norm is not None and norm_value > clip_norm:
            self.backbone.scale(clip_norm / norm_value)
            for _, values in self._table_values():
                values.mul_(clip_norm / norm_value)
        return Gradient(loss_value, norm_value, finite)

    def _accumulate(self, batch: TokenBatch) -> Tensor:
        """`step.accumulate`, on this rank's part of the batch -> its part of the loss."""
        targets = torch.tensor(number_of_targets(batch), device=self.device)
        all_targets = int(self.world.sum(targets))
        micro_batches = weighted_micro_batches(batch, self._micro_batch_size, self.device, all_targets)
        total = torch.zeros((), device=self.device)
        for number, (weight, tensors) in enumerate(micro_batches, start=1):
            loss = self.backbone.run("loss", *tensors) * weight
            self.backbone.backward(loss, last=number == len(micro_batches))
            if len(micro_batches) > 1:
                merge_table_gradients(self.model)
            total += loss.detach()
        return total

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Global norm of the gradient, each table counted once, float64 []."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for name, values in self._table_values():
            squares[int(self._is_whole(name))] += torch.linalg.vector_norm(values).double().square()
        divided, whole = squares.split(1)
        if self._stored.divided:
            self.world.sum(divided)
        return (self.backbone.squared_norm() + divided.sum() + whole.sum()).sqrt()

    def _is_whole(self, table: str) -> bool:
        """Whether every rank holds all rows of it, and the same gradient."""
        return not self._stored.divided or table not in self._stored.names

    def _table_values(self) -> Iterator[tuple[str, Tensor]]:
        for name, table in self._tables.items():
            if table.grad is not None:
                yield name, table.grad._values() if table.grad.is_sparse else table.grad

    def apply_gradient(self, lr: float) -> None:
        self.backbone.step(lr)
        self._table_optimizer.step(lr)
        self._rows.updated()
        sum_router_loads(self.model, self.world)
        self.model.update_router_bias()
        self._table_optimizer.zero_grad()

    def discard_gradient(self) -> None:
        self.backbone.discard()
        self.model.forget_router_loads()
        self._table_optimizer.zero_grad()

    def nonfinite_gradients(self) -> list[str]:
        found = {name for name, values in self._table_values() if not values.isfinite().all()}
        tables = set().union(*self.world.gather(found))
        return sorted({*self.backbone.nonfinite_gradients(), *tables})

    # ----------------------------------------------------------------------------------------------------- a look at it

    def validation_loss(self, batches: Iterable[TokenBatch]) -> float:
        def token_losses(*tensors: Tensor | None) -> Tensor:
            return self.backbone.run("token_losses", *tensors)

        shares = self._rows.each(share_of(batch, self.world) for batch in batches)
        total, count = self.world.sum(loss_sums(self.model, token_losses, shares, self.device)).tolist()
        return total / max(count, 1)

    def layer_statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Of this rank's part of the batch."""
        return layer_statistics(self.model, batch, self._micro_batch_size, self.device)

    def measures(self) -> dict[str, float]:
        return self._rows.measures()

    def roles_table(self) -> str:
        return self._roles_table

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        self._rows.flush()
        for kind, whole, replicated in (
            ("model", self.backbone.full_tensors("parameters"), self._outside_backbone()),
            ("optim", self.backbone.full_tensors("optimizer"), self._whole_state()),
        ):
            # Some had more rows to write than others.
            self.world.meet()
            parts = self._share(whole), self._share_rows(replicated), self._stored.slices(kind)
            yield from bounded_files(kind, self.world.rank, chain.from_iterable(parts))

    def _outside_backbone(self) -> dict[str, Tensor]:
        """Tables, and buffers that belong to the model."""
        inside = {name for name, _ in self.model.named_parameters()} - self._tables.keys() | self._stored.names
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in inside}

    def _whole_state(self) -> dict[str, Tensor]:
        """What the table optimizer keeps of tables that every rank holds."""
        return {key: each for key, each in self._table_optimizer.tensors().items() if not self._stored.owns(key)}

    def _share(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes of them; every rank walks over all, which takes all ranks."""
        for number, each in enumerate(tensors):
            if number % self.world.size == self.world.rank:
                yield each

    def _share_rows(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The same of what every rank holds: of tables, each rank's part of the rows."""
        yield from self._share((name, each) for name, each in tensors.items() if not self._is_of_table(name))
        for name, tensor in tensors.items():
            if self._is_of_table(name):
                own = row_ranges(len(tensor), self.world.size, self.world.size)[self.world.rank]
                yield from row_slices(name, tensor[own.start : own.stop], own.start)

    def _is_of_table(self, key: str) -> bool:
        return key in self._tables or key.rpartition("/")[0] in self._tables

    def scalars(self) -> dict[str, int | float]:
        return {**self.backbone.counts(), **self._table_optimizer.scalars()}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        checkpoint.check(self.model, self._shapes)
        saved = checkpoint.tensors("model")
        self.backbone.load_tensors("parameters", saved)
        with torch.no_grad():
            for name, tensor in self._outside_backbone().items():
                tensor.copy_(saved[name])
            self._stored.load("model", saved)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.load_weights(checkpoint)
        saved, counts = checkpoint.tensors("optim"), checkpoint.state["optimizer"]
        self.backbone.load_tensors("optimizer", saved)
        self.backbone.load_counts(counts)
        tables = self._table_optimizer
        tables.load_tensors(saved.only(tables.tensors().keys().__contains__), apart=self._stored.owns)
        self._stored.load("optim", saved)
        tables.load_scalars({key: counts[key] for key in tables.scalars() if key in counts})
