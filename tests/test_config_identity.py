"""A run's name depends on what it trains, and on nothing else."""

from pathlib import Path

import pytest

from engram.config import Config, load_config, save_config
from engram.config_identity import run_id, semantic_settings, within

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "train.threads=1",
        "train.compile=false",
        "train.log_every=7",
        "train.checkpoint_every=3",
        "train.skip_nonfinite=3",
        "train.wandb.mode=disabled",
        "eval.prompt=Once",
        "eval.batch_size=2",
        "data.cache=elsewhere",
        # Written out, but the default.
        "model.norm_eps=0.000001",
    ],
)
def test_settings_that_change_no_run_change_no_name(override: str) -> None:
    assert run_id(load_config(QUICKSTART, [override])) == run_id(load_config(QUICKSTART))


def test_settings_that_matter_change_the_name() -> None:
    overrides = [
        "seed=1",
        "optim.lr=0.1",
        "train.steps=3",
        "model.memory=null",
        "eval.tokens=512",
        "data.shuffle_seed=1",
    ]
    names = {run_id(load_config(QUICKSTART, [override])) for override in overrides}
    assert len(names | {run_id(load_config(QUICKSTART))}) == len(overrides) + 1


def test_a_section_without_settings_is_told_apart_from_an_absent_one() -> None:
    with_it = load_config(QUICKSTART, ["model.memory.conv={}"])
    without = load_config(QUICKSTART, ["model.memory.conv=null"])
    connected = load_config(QUICKSTART, ["model.hyper_connection={}"])
    plain = load_config(QUICKSTART, ["model.hyper_connection=null"])
    assert len({run_id(config) for config in (with_it, without, connected, plain)}) == 4 - (with_it == connected)


def test_a_saved_config_keeps_its_name(tmp_path: Path) -> None:
    config = load_config(QUICKSTART)
    save_config(config, tmp_path / "config.yaml")
    assert run_id(load_config(tmp_path / "config.yaml")) == run_id(config)


def test_the_name_is_the_same_everywhere() -> None:
    """Twelve digits that committed results rely on: a change of this number orphans every finished run."""
    tree = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "vocab_size": 40,
            "attention": dict(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6),
        },
        "data": {"path": "data/small", "sequence_length": 8},
        "train": {"steps": 5, "batch_size": 6},
    }
    config = Config.model_validate(tree)
    assert semantic_settings(config) == {
        "model.num_layers": 2,
        "model.hidden_size": 16,
        "model.vocab_size": 40,
        "model.attention.num_heads": 2,
        "model.attention.kv_lora_rank": 8,
        "model.attention.qk_nope_head_dim": 4,
        "model.attention.qk_rope_head_dim": 4,
        "model.attention.v_head_dim": 6,
        "data.sequence_length": 8,
        "train.steps": 5,
        "train.batch_size": 6,
    }
    assert run_id(config) == "ba16fbd78f66"


def test_names_of_sections_cover_what_lies_below() -> None:
    assert within("eval.prompt", ("eval",)) and within("eval", ("eval",)) and not within("evaluation", ("eval",))
