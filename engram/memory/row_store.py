"""Where all rows of a table lie when the device holds only some: host memory, or a file that is mapped into it.

Files are scratch space of a process, not the state of a run: checkpoints are written from them, and a resumed run fills
new ones.
"""

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from engram.config import UserError
from engram.kernels.engram_lookup import advise_huge_pages


class HostStore:
    """Tensors in host memory."""

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros. Raises UserError: not enough memory."""
        try:
            rows = torch.zeros(shape, dtype=dtype)
        except (MemoryError, RuntimeError) as error:
            size = shape[0] * max(1, torch.Size(shape[1:]).numel()) * dtype.itemsize
            raise UserError(
                f"train.tables: {name} takes {size / 1e9:,.1f} GB of host memory, which are not there: set "
                "train.tables.tier to file, or divide the tables among more ranks"
            ) from error
        advise_huge_pages(rows)
        return rows


class FileStore:
    """Tensors in files on the disk of `folder`, mapped into memory; the operating system keeps what is used often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros, in a file that goes with the process. Raises UserError: a full or read-only disk."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.zeros(shape, dtype=dtype)
        path, nbytes = self.folder / f"{name.replace('/', '.')}.rows", count * dtype.itemsize
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w+b") as file:
                # Without a name, it is gone when nobody has it mapped, however the process ends.
                path.unlink()
                # Now, not at some step, if there is no space.
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise UserError(
                f"train.tables: {path} cannot hold {nbytes / 1e9:,.2f} GB ({error.strerror}): choose another "
                "train.tables.folder, or free space there"
            ) from error
        # Rows of a step lie anywhere: what stands around them is of no use.
        mapped.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)
