"""The tensors of a checkpoint, whole or by rows, however many files hold them and whoever wrote those.

`model` stands for model.safetensors and any model-*.safetensors beside it; `optim` likewise. A tensor named
`table[300:400]` holds rows 300 to 399 of `table`; what one process writes is whole. So any number of ranks reads what
any other number wrote.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram.config import UserError

# Bytes of one file of a checkpoint, and of what a rank holds of it while it is written.
FILE_BYTES = 2**31
# Of one tensor's rows, where they are read or written in slices.
SLICE_BYTES = 2**28

_ROWS = re.compile(r"(?P<name>.+)\[(?P<first>\d+):(?P<stop>\d+)\]")


class TensorFilesError(UserError):
    """Files of tensors that cannot be read, or lack something; the message names the file."""


def bounded_files(
    kind: str, rank: int, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name of a file, copies of its tensors) of what `rank` writes of `kind`: files of FILE_BYTES or little more.

    The first rank always writes one that is called `kind`.
    """
    part, held = 0, dict[str, Tensor]()
    for name, tensor in tensors:
        held[name] = tensor.detach().to("cpu", copy=True)
        if sum(each.nbytes for each in held.values()) >= FILE_BYTES:
            yield _file_name(kind, rank, part), held
            part, held = part + 1, {}
    if held or (rank == 0 and part == 0):
        yield _file_name(kind, rank, part), held


def _file_name(kind: str, rank: int, part: int) -> str:
    return kind if rank == 0 and part == 0 else f"{kind}-{rank:05d}-{part:05d}"


def rows_key(name: str, first: int, stop: int) -> str:
    """The name under which rows `first` to `stop` - 1 of the tensor `name` are written."""
    return f"{name}[{first}:{stop}]"


def row_slices(name: str, rows: Tensor, first: int) -> Iterator[tuple[str, Tensor]]:
    """`rows` of the tensor `name`, from row `first` of it on, as (name[first:stop], rows) of SLICE_BYTES at most."""
    at_once = rows_at_once(rows)
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        yield rows_key(name, first + start, first + start + len(part)), part


def rows_at_once(rows: Tensor) -> int:
    """How many rows make SLICE_BYTES."""
    return max(1, SLICE_BYTES // max(1, rows[:1].nbytes))


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor that one file holds."""

    path: Path
    key: str
    shape: tuple[int, ...]
    first: int
    stop: int


@dataclass
class _Stored:
    """A tensor, as its pieces in the order of rows."""

    pieces: list[_Piece] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        last = self.pieces[-1]
        return (last.stop, *last.shape[1:]) if last.shape else ()


class TensorFiles(Mapping[str, Tensor]):
    """Name -> whole tensor, of `folder`'s files called `kind`. Reads headers at once, and values each time it is asked.

    Raises TensorFilesError: a file that cannot be read, rows that no file holds or that two files hold.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._stored: dict[str, _Stored] = {}
        for path in (folder / f"{kind}.safetensors", *sorted(folder.glob(f"{kind}-*.safetensors"))):
            for piece, name in _pieces(path):
                self._stored.setdefault(name, _Stored()).pieces.append(piece)
        for name, stored in self._stored.items():
            stored.pieces.sort(key=lambda piece: piece.first)
            _check_rows(name, stored.pieces)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, whole."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def only(self, keep: Callable[[str], bool]) -> Self:
        """Those tensors whose names `keep` chooses; nothing is read for it."""
        chosen = copy(self)
        chosen._stored = {name: stored for name, stored in self._stored.items() if keep(name)}
        return chosen

    def __getitem__(self, name: str) -> Tensor:
        parts = [_read(piece) for piece in self._stored[name].pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def rows(self, name: str, first: int, stop: int, at_once: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `first` to `stop` - 1 in order, as (number of the first row, rows): `at_once` rows at most each time."""
        for piece in self._stored[name].pieces:
            start, end = max(first, piece.first), min(stop, piece.stop)
            for row in range(start, end, at_once):
                upto = min(row + at_once, end)
                yield row, _read(piece, slice(row - piece.first, upto - piece.first))

    def mapped(self, name: str) -> list[tuple[int, Tensor]]:
        """(first row, rows) of a tensor's pieces, in order, mapped into memory: read where they are looked at.

        Writing to them changes no file.
        """
        return [(piece.first, _map(piece)) for piece in self._stored[name].pieces]


def _map(piece: _Piece) -> Tensor:
    """Bytes of a safetensors file: the length of its header (8), the header, tensors."""
    with _opened(piece.path) as file:
        dtype = file.get_slice(piece.key)[:0].dtype
    with open(piece.path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start, stop = json.loads(stream.read(length))[piece.key]["data_offsets"]
        if start == stop:
            return torch.empty(piece.shape, dtype=dtype)
        contents = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    contents.madvise(mmap.MADV_RANDOM)
    count = (stop - start) // dtype.itemsize
    return torch.frombuffer(contents, dtype=dtype, count=count, offset=8 + length + start).view(piece.shape)


def _pieces(path: Path) -> Iterator[tuple[_Piece, str]]:
    with _opened(path) as file:
        for key in sorted(file.keys()):
            shape = tuple(file.get_slice(key).get_shape())
            match = _ROWS.fullmatch(key)
            if match is None:
                yield _Piece(path, key, shape, 0, shape[0] if shape else 1), key
            else:
                yield _Piece(path, key, shape, int(match["first"]), int(match["stop"])), match["name"]


def _check_rows(name: str, pieces: list[_Piece]) -> None:
    row = 0
    for piece in pieces:
        if piece.first != row:
            what = "rows {} to {} are in no file" if piece.first > row else "row {1} is in two files"
            raise TensorFilesError(f"{piece.path}: of {name}, {what.format(row, piece.first - (piece.first > row))}")
        if piece.shape and piece.stop - piece.first != piece.shape[0]:
            raise TensorFilesError(f"{piece.path}: {piece.key} holds {piece.shape[0]} rows")
        row = piece.stop


def _read(piece: _Piece, rows: slice | None = None) -> Tensor:
    with _opened(piece.path) as file:
        return file.get_tensor(piece.key) if rows is None else file.get_slice(piece.key)[rows]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TensorFilesError(f"{path}: cannot be read ({error})") from None
