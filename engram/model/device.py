"""Where a model computes."""

import torch

from engram.config import UserError


def choose_device(wanted: str, setting: str) -> torch.device:
    """`wanted`: auto, cpu or cuda, as `setting` says. Raises UserError where CUDA is asked for and not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{setting} is cuda, but torch sees no CUDA device: set {setting} to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
