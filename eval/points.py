"""Names of the places in a block that analyses read (`eval.capture.Capture` tells what stands there)."""

from typing import Literal

Point = Literal[
    "resid_pre",
    "resid_memory",
    "resid_mid",
    "resid_post",
    "memory_out",
    "attn_out",
    "ffn_out",
    "gates",
    "experts",
    "expert_weights",
]
