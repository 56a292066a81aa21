"""Contests between differentiable functions: forward, backward, and both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contest import Contender, Contest, Run
from benchmarks.targets import Target

Differentiable = Callable[..., Sequence[Tensor]]
Pass = Callable[[Differentiable, Sequence[Tensor], Sequence[Tensor]], Run]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"


def forward_run(function: Differentiable, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Run:
    """The forward pass of a training step, which also keeps what the backward pass will read."""
    return Run(lambda: function(*inputs))


def backward_run(function: Differentiable, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Run:
    """The backward pass alone: a step's forward pass is its preparation."""
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = function(*inputs)

    return Run(lambda: torch.autograd.grad(outputs, _wanted(inputs), cotangents), prepare=forward)


def training_run(function: Differentiable, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Run:
    """The outputs, then the gradients of all inputs that ask for one; `cotangents` are d loss / d output."""

    def step() -> Sequence[Tensor]:
        outputs = function(*inputs)
        return [*outputs, *torch.autograd.grad(outputs, _wanted(inputs), cotangents)]

    return Run(step)


def _wanted(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor.requires_grad]


PASSES: dict[str, Pass] = {FORWARD: forward_run, BACKWARD: backward_run, BOTH: training_run}


@dataclass(frozen=True)
class Operation:
    """`reference` on the same inputs in float32 is what every way is compared with.

    A way is built where it is used, so that what cannot be imported is reported.
    """

    op: str
    title: str
    reference: Differentiable
    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    ways: dict[str, Callable[[], Differentiable]]
    tolerance: float
    ideal_bytes: dict[str, int] = field(default_factory=dict)

    def contest(self, way: str, *, anchors: Sequence[Contender] = (), targets: Sequence[Target] = ()) -> Contest:
        run, ideal_bytes = PASSES[way], self.ideal_bytes.get(way)

        def contender(name: str, build: Callable[[], Differentiable]) -> Contender:
            return Contender(name, lambda: run(build(), self.inputs, self.cotangents), self.tolerance, ideal_bytes)

        def expected() -> Sequence[Tensor]:
            wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in self.inputs]
            reference = run(self.reference, wide, [tensor.float() for tensor in self.cotangents])
            reference.prepare()
            return [tensor.detach() for tensor in reference.step()]

        contenders = [contender(name, build) for name, build in self.ways.items()]
        return Contest(self.op, f"{self.op}, {way}: {self.title}", expected, [*anchors, *contenders], targets)


def contests(
    operation: Operation, passes: Sequence[str], copy: Contender, targets: dict[str, Sequence[Target]]
) -> Iterator[Contest]:
    """One contest for each pass, beside a copy that tells the bandwidth."""
    for way in passes:
        yield operation.contest(way, anchors=[copy], targets=targets.get(way, ()))
