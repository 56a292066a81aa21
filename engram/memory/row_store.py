"""Where all rows of a table lie when the device holds only some: host memory, or a file that is mapped into it.

Files are scratch space of a process, not the state of a run: checkpoints are written from them, and a resumed run fills
new ones.
"""

import errno
import mmap
import os
import tempfile
from contextlib import suppress
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
    """Tensors in files on the disk of `folder`, mapped into memory; the operating system keeps what is used often.

    Files have no name: nobody else can open them, and they are gone when the process is, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros. Raises UserError: a folder that cannot be written, or without room."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.zeros(shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        made = [path for path in (self.folder, *self.folder.parents) if not os.path.exists(path)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Now, not at some step, if there is no space.
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            for path in made:
                # Other ranks may have their files in it.
                with suppress(OSError):
                    path.rmdir()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            size = f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes:,} bytes"
            raise UserError(
                f"train.tables: {self.folder} cannot hold {size} for {name} ({error.strerror}): choose "
                f"another train.tables.folder{', or free space there' if full else ''}"
            ) from error
        # Rows of a step lie anywhere: what stands around them is of no use.
        mapped.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)
