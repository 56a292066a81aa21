"""The model as DeepSpeed sees it: without the modules whose parameters are not for it, such as tables.

It puts hooks on all modules that it finds, divides or sums up all parameters that it finds, and in some stages asks for
them anew in every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class ModelEntry(nn.Module):
    """What DeepSpeed takes for the model: its forward pass is any method of it, and some modules are not seen."""

    def __init__(self, model: nn.Module, outside: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self._outside = {inner for module in outside for inner in module.modules()}

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.model, method)(*arguments)

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module in super().named_modules(*arguments, **options):
            if module not in self._outside:
                yield name, module


def modules_outside(model: nn.Module, inside: set[nn.Parameter]) -> list[str]:
    """Names of the modules that hold other parameters directly."""
    outside = []
    for name, module in model.named_modules():
        kinds = {parameter in inside for parameter in module.parameters(recurse=False)}
        assert len(kinds) < 2, f"{name} holds parameters of tables and of the backbone: they must be in modules apart"
        if kinds == {False}:
            outside.append(name)
    return outside


@contextmanager
def taken_out(model: nn.Module, outside: list[str]) -> Iterator[None]:
    """While DeepSpeed walks over modules and puts its hooks on them, some are not there."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in outside]
    modules = [parent._modules[leaf] for parent, leaf in places]
    for parent, leaf in places:
        parent._modules[leaf] = None
    try:
        yield
    finally:
        for (parent, leaf), module in zip(places, modules, strict=True):
            parent._modules[leaf] = module
