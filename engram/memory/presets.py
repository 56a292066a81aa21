"""The three published variants of the module, as settings of `MemoryConfig` to start from."""

from typing import Any, Literal


def preset(variant: Literal["paper", "v4_1", "ple"]) -> dict[str, Any]:
    """The recipe of a variant; layers and sizes (`layer_ids`, `head_dim`, `rows_per_head`) remain to be chosen.

    `MemoryConfig(**preset("v4_1"), layer_ids=[1, 14], head_dim=256, rows_per_head=16_000_000)`
    """
    return {
        # Engram (2601.07372) and its demonstration code.
        "paper": {
            "num_heads": 8,
            "max_ngram_size": 3,
            "compression": True,
            "multipliers": "pcg64",
            "look_back": "sequence",
            "gate": "signed_sqrt",
            "conv": {"kernel_size": 4, "zero_init": True},
            "projection_bias": False,
        },
        # DeepSeek-V4.1 (2609.19969); its tables are trained with `optim.table.kind: sinkhorn`.
        "v4_1": {
            "num_heads": 8,
            "max_ngram_size": 4,
            "compression": True,
            "multipliers": "pcg64",
            "look_back": "segment",
            "gate": "signed_sqrt",
            "conv": None,
            "projection_bias": False,
            "norm_eps": 1e-20,
        },
        # Qwen3.8-Flash-Next (2608.30320). Give its end-of-text token as `pad_id`.
        "ple": {
            "num_heads": 8,
            "max_ngram_size": 3,
            "compression": False,
            "multipliers": "splitmix64",
            "look_back": "eos",
            "seed": 1234,
            "gate": "signed_sqrt",
            "conv": {"kernel_size": 4, "zero_init": True},
            "projection_bias": False,
            "zero_centred_gains": True,
            "norm_eps": 1e-6,
            "conv_norm_eps": 1e-6,
        },
    }[variant]
