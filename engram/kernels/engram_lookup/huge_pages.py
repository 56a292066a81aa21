"""Large tables on large pages: random rows then miss the processor's page cache (TLB) far less often."""

import ctypes
import mmap
import sys

from torch import Tensor

# Smaller tables fit the second level of today's TLBs.
LEAST_BYTES = 8 << 20


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back a large CPU tensor with huge pages; best before its first write. It may decline: no harm."""
    size = tensor.numel() * tensor.element_size()
    if sys.platform != "linux" or tensor.device.type != "cpu" or size < LEAST_BYTES:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + size - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
