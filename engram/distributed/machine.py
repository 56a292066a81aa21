"""How fast the machines of a cluster are that is not there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Of one rank. An H100's bfloat16 matrix products at their best, so that the least time is left to hide in; links
    of 400 Gbit/s, which is also PCIe 5 x16 to host memory; a file whose pages are in memory, copied by one core.
    """

    device_tflops: float = 790.0
    device_gb: float = 80.0
    # Gbit/s to other ranks, to host memory, and to a file.
    link_gbps: float = 400.0
    host_gbps: float = 400.0
    file_gbps: float = 104.0
