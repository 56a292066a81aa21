"""DeepSpeed's ZeRO for the backbone: all parameters but the n-gram tables. The only file that imports DeepSpeed.

DeepSpeed divides and gathers parameters, and sums gradients; norm, clipping and update rules are the project's own. It
works in float32, the dtype of the parameters: the model casts to its compute dtype itself. Where it offers no way to
what it holds, this file reads its attributes, and therefore accepts one version only.
"""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from engram.config import Config, UserError
from engram.distributed.expert_parallel import ShardedExperts, sharded_experts
from engram.distributed.model_entry import ModelEntry, modules_outside, taken_out
from engram.distributed.role_steps import RoleSteps, divided_share, undivided_shares
from engram.distributed.shares import (
    Member,
    Piece,
    Share,
    along_group,
    along_parameters,
    copy_pieces,
    in_parts,
    lacks,
    saved_tensor,
    whole_states,
    whole_tensor,
)
from engram.distributed.world import World
from engram.model.transformer import Transformer
from engram.optim.groups import Assignment
from engram.optim.optimizer import OptimizerStateError

VERSION = "0.19.8"
# Elements that DeepSpeed sums or gathers in one message.
MESSAGE_ELEMENTS = 2**26

Kind = Literal["parameters", "optimizer"]


class Backbone:
    """Weights, gradients and optimizer state of all parameters without the role `table`, divided by ZeRO 0 to 3.

    All ranks call the same methods in the same order, with as many `backward`s. Stages 0 and 1 sum gradients over ranks
    once a step; 2 and 3 do so in every `backward`, because no rank holds all of them. In stage 3, parameters are there
    only while a method of the model runs that was called through `run`.
    """

    def __init__(
        self,
        model: Transformer,
        assignments: Sequence[Assignment],
        config: Config,
        world: World,
        *,
        persistence_threshold: int = 100_000,
    ) -> None:
        """`assignments`: of the whole model, or of those parameters that DeepSpeed may see.

        Stage 3 keeps parameters of up to `persistence_threshold` elements whole on every rank. Raises UserError:
        DeepSpeed is not there, or another version.
        """
        assert config.distributed is not None
        self.stage = config.distributed.zero_stage
        self.offload = config.distributed.offload_optimizer
        self.world = world
        own = [each for each in assignments if each.role != "table"]
        shapes = {each.name: each.shape for each in own}
        outside = modules_outside(model, {each.parameter for each in own})
        self._expert_ranks = config.distributed.expert_ranks
        self._experts = {
            parameter: module for module in sharded_experts(model).values() for parameter in module.parameters()
        }
        expert_group = f"ep_size_{self._expert_ranks}"
        self._steps = RoleSteps(own, self._experts, {"moe": True, "name": expert_group})
        settings = _settings(config, world, sum(each.numel for each in own), persistence_threshold)
        entry = ModelEntry(model, [model.get_submodule(name) for name in outside])
        deepspeed = _import_deepspeed(world)
        if self._experts:
            with _quiet():
                _divide_experts(entry, self._experts, expert_group, self._expert_ranks, self.stage)
        with _quiet(), taken_out(model, outside):
            if self.stage == 3:
                # One parameter after the other, from wherever it lies: the whole backbone may not fit on the device.
                deepspeed.zero.Init(module=entry, config_dict_or_path=settings)
            self._engine = deepspeed.initialize(model=entry, optimizer=self._steps, config=settings)[0]
        self._zero = self._engine.optimizer
        self.shares = self._make_shares(shapes, config)

    # ------------------------------------------------------------------------------------------------------ one step

    def run(self, method: str, *arguments: Any) -> Any:
        """`model.<method>(*arguments)`: the way to a loss for `backward`, and in stage 3 to any forward pass."""
        return self._engine(method, *arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add one micro-batch's gradient; `loss` comes from `run`. After the last, it is the sum over all ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        with _stack_as_before():
            self._engine.backward(loss, scale_wrt_gas=False)
        if last:
            # DeepSpeed has taken the mean over ranks. A factor on the loss would reach the tables' gradients too.
            self.scale(self.world.size)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Sum of squares of the whole gradient, float64 [], the same on all ranks; collective."""
        norms = [torch.linalg.vector_norm(part) for share in self.shares for part in self._gradient_parts(share)]
        squares = torch.stack(norms).double().square().to(self.world.device)
        if self.stage == 0:
            # Each counts on every rank that holds it: all ranks, or those with the same experts.
            experts = [share.members[0].assignment.parameter in self._experts for share in self.shares]
            holders = torch.full_like(squares, self.world.size)
            holders[torch.tensor(experts, device=holders.device)] /= self._expert_ranks
            squares = squares / holders
        return self.world.sum(squares.sum())

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the gradient, before any momentum takes it in."""
        torch._foreach_mul_([part for share in self.shares for part in self._gradient_parts(share)], factor)

    def step(self, lr: float) -> None:
        """One update at base learning rate `lr`, and forget the gradient."""
        self._steps.lr = lr
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed skipped a step: its gradient was not finite"

    def discard(self) -> None:
        """Forget the gradient of this step, finite or not."""
        self._steps.lr = None
        with _quiet():
            self._engine.step()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient in the parameter's shape), one after the other; collective."""
        for share in self.shares:
            flat = self._flat_gradient(share)
            for member in share.members:
                yield member.name, whole_tensor(member, flat, self.world)

    def nonfinite_gradients(self) -> list[str]:
        """Names of the parameters whose gradients hold an infinity or a NaN; collective."""
        found = {
            member.name
            for share in self.shares
            for flat in (self._flat_gradient(share),)
            for member in share.members
            for piece in member.pieces_on(self.world.rank)
            if not flat[piece.offset : piece.offset + piece.length].isfinite().all()
        }
        return sorted(set().union(*self.world.gather(found)))

    # --------------------------------------------------------------------------------------------------- checkpoints

    def full_tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor), one after the other: to be used before the next is asked for; collective.

        Parameters under their names; state of optimizers as `<parameter>/<state>`, as one process names it.
        """
        if kind == "optimizer":
            yield from whole_states(self.shares, self.world)
            return
        for share in self.shares:
            for member in share.members:
                whole = member.assignment.parameter.detach()
                # Before stage 3, every rank holds every parameter, but for other ranks' experts.
                if self.stage == 3 or member.assignment.parameter in self._experts:
                    whole = whole_tensor(member, share.weights.detach(), self.world)
                yield member.name, whole

    @torch.no_grad()
    def load_tensors(self, kind: Kind, saved: Mapping[str, Tensor]) -> None:
        """Take over whole tensors, each looked up once; others in `saved` are left alone.

        Raises OptimizerStateError: a missing name, or another shape or dtype.
        """
        for share in self.shares:
            flats = {"": share.weights} if kind == "parameters" else share.states()
            for state, flat in flats.items():
                for member in share.members:
                    whole = saved_tensor(saved, f"{member.name}/{state}" if state else member.name, member.shape)
                    copy_pieces(member, flat.view(-1), whole, self.world)
                    if not state:
                        self._put_parameter(member, whole)

    def counts(self) -> dict[str, int]:
        """Numbers of updates, as `<parameter>/step`."""
        return {key: count for share in self.shares for key, count in share.counts().items()}

    def load_counts(self, saved: Mapping[str, int | float]) -> None:
        """Take over numbers of updates. Raises OptimizerStateError: a missing name."""
        if missing := sorted(self.counts().keys() - saved.keys()):
            raise OptimizerStateError(lacks(missing[0]))
        for share in self.shares:
            share.load_counts(saved)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._engine.destroy()

    # ------------------------------------------------------------------------------------------- inside of DeepSpeed

    def _make_shares(self, shapes: Mapping[str, torch.Size], config: Config) -> list[Share]:
        if self.stage == 0:
            holders = range(self.world.size // self._expert_ranks)
            parts: dict[Tensor, Member] = {
                each.parameter: self._member(each, each.shape, tuple(Piece(rank, 0, 0, each.numel) for rank in holders))
                for kind in self._steps.kinds
                for each in kind
                if each.parameter in self._experts
            }
            return undivided_shares(self._steps, config.optim, parts)
        assignments = {each.parameter: each for kind in self._steps.kinds for each in kind}
        groups = self._zero.fp16_groups if self.stage == 3 else self._zero.bit16_groups
        shares = []
        for index, parameters in enumerate(groups):
            own = [assignments[parameter] for parameter in parameters]
            sizes = [shapes[each.name].numel() for each in own]
            ranks = self.world.size // (self._expert_ranks if own[0].parameter in self._experts else 1)
            if self.stage == 3:
                weights = self._zero.fp32_partitioned_groups_flat[index]
                pieces = along_parameters(sizes, ranks)
            else:
                weights = self._zero.single_partition_of_fp32_groups[index]
                pieces = along_group(sizes, weights.numel(), ranks)
            members = [self._member(each, shapes[each.name], where) for each, where in zip(own, pieces, strict=True)]
            key = f"{own[0].role} {index}"
            shares.append(divided_share(self._steps, key, weights, members, config.optim, self.world))
        return shares

    def _member(self, each: Assignment, shape: torch.Size, pieces: tuple[Piece, ...]) -> Member:
        """Of divided experts, what all ranks hold together."""
        if each.parameter not in self._experts:
            return Member(each, shape, pieces)
        whole = torch.Size((shape[0] * self._expert_ranks, *shape[1:]))
        return Member(each, whole, in_parts(pieces, self._expert_ranks, shape.numel()))

    def _gradient_parts(self, share: Share) -> list[Tensor]:
        """This rank's gradient: tensors that make up that of the share's weights, one behind the other."""
        if self.stage == 0 or self.offload:
            assert share.weights.grad is not None
            return [share.weights.grad]
        parts: list[Tensor] = self._zero.averaged_gradients[self.shares.index(share)]
        return parts

    def _flat_gradient(self, share: Share) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self._gradient_parts(share)])

    def _put_parameter(self, member: Member, whole: Tensor) -> None:
        """The weights that forward passes read, where they are not the optimizer's own."""
        parameter: Any = member.assignment.parameter
        if self.stage == 0:
            return
        if self.stage == 3:
            for piece in member.pieces_on(self.world.rank):
                parameter.ds_tensor[: piece.length].copy_(whole.reshape(-1)[piece.start : piece.start + piece.length])
        if (module := self._experts.get(parameter)) is not None:
            whole = whole[module.first : module.first + module.num_local]
        # In stage 3 it is empty, unless it is too small to be divided.
        if parameter.shape == whole.shape:
            parameter.copy_(whole)


def _divide_experts(
    entry: nn.Module, experts: Mapping[nn.Parameter, ShardedExperts], name: str, size: int, stage: int
) -> None:
    """Tell DeepSpeed which parameters are other ones on other ranks: it sums their gradients, and divides them, among
    the ranks that hold the same ones. It takes the mean over all ranks, as of other gradients.

    Without the marks it would overwrite all experts with those of rank 0, and mix up their gradients.
    """
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Mark(MoE):
        """Stages 0 to 2 look at experts only where a module of this class is found."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, *_: object) -> None:
            """The groups are there already."""

    # Its own view of the ranks that have met already.
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    groups._create_expert_and_data_parallel(size)
    for parameter in experts:
        marks = {"allreduce": False, "group_name": name}
        if stage == 3:
            # Which refuses modules of its own class, but not the parameters of another kind of layer.
            group = groups._get_expert_data_parallel_group(name)
            marks["ds_zero_placement_family"] = "autoep_expert"
            marks["ds_zero_partition_group_name"] = name
            marks["ds_zero_partition_process_group"] = group
        vars(parameter).update(marks)
    if stage < 3:
        entry.expert_mark = Mark()


def _settings(config: Config, world: World, elements: int, persistence_threshold: int) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    assert config.distributed is not None
    message = min(elements + elements % 2, MESSAGE_ELEMENTS)
    zero: dict[str, Any] = {
        "stage": config.distributed.zero_stage,
        "reduce_bucket_size": message,
        "allgather_bucket_size": message,
        "stage3_prefetch_bucket_size": message,
        "stage3_param_persistence_threshold": persistence_threshold,
    }
    if config.distributed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    elif config.distributed.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # Its Adam on CPUs is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _import_deepspeed(world: World) -> Any:
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != VERSION:
        found = "is not installed" if version is None else f"is {version}"
        raise UserError(
            f"runs on several ranks need deepspeed {VERSION}, but it {found}: pip install deepspeed=={VERSION}"
        )
    # Else it would look for devices by itself, and might choose others than the config does.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # It asks for this also where nobody launched ranks.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    # Without this, it looks for a compiler, and compiles an operation for ranks of one machine, at the first start.
    deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    # Its own handler writes to standard output.
    logger.handlers.clear()
    logger.propagate = True
    # Functions of torch that it calls: nothing that whoever trains could change.
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of DeepSpeed: it warns of every optimizer that is not its own."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _stack_as_before() -> Iterator[None]:
    """Stage 3 keeps a stack of the modules that run: a checkpointed block's second run, which stops early, stays on it.

    It must stop early: a run to its end would take away parameters that gradients are about to be computed for.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    yield
    del FWD_MODULE_STACK[depth:]
