"""Training that starts from another run's weights, such as the extension of a finished model to a longer context."""

from typing import Any

from engram.config import Config, ConfigError
from engram.config_identity import within
from engram.distributed.world import World
from engram.training.checkpoint import open_checkpoint
from engram.training.checkpoint_files import CHECKSUMS
from engram.training.engine import Engine
from engram.training.files import sha256
from engram.training.run_folder import differences

# Settings of the model that say where tokens stand and hold no weights.
POSITIONS = ("model.attention.rope_theta", "model.attention.yarn")


def start_from(path: str, config: Config, engine: Engine, tokenizer_digest: str, world: World) -> dict[str, Any]:
    """Copy a checkpoint's weights into the engine's model; -> its folder, step and digest, for the run's record.

    `path` is a checkpoint or a run folder: its latest. Raises ConfigError where the models differ in more than
    POSITIONS, or were made for different tokenizers; CheckpointError where there is no checkpoint, or a damaged one.
    """
    with world.together():
        checkpoint = open_checkpoint(path, world)
    theirs, ours = (each.model_dump(mode="json") for each in (checkpoint.config.model, config.model))
    changes = differences(theirs, ours, "model.")
    forbidden = [text for key, text in changes.items() if not within(key, POSITIONS)]
    if forbidden:
        raise ConfigError(
            f"train.init_from {checkpoint.folder}: holds another model:\n  "
            + "\n  ".join(forbidden)
            + f"\nonly {' and '.join(POSITIONS)} may differ: set the others as they were"
        )
    if (found := checkpoint.state.get("tokenizer_digest")) != tokenizer_digest:
        raise ConfigError(
            f"train.init_from {checkpoint.folder}: was trained with tokenizer {str(found)[:12]}..., but data.path "
            f"{config.data.path} has {tokenizer_digest[:12]}...: prepare the data with data.tokenizer.path="
            f"{checkpoint.folder}"
        )
    engine.load_weights(checkpoint)
    return {
        "checkpoint": str(checkpoint.folder),
        "step": int(checkpoint.state["step"]),
        # Of the file that holds the digests of all others.
        "sha256": sha256(checkpoint.folder / CHECKSUMS),
    }
