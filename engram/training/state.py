"""All that a run carries from step to step, and its way into a checkpoint and back."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from engram.config import Config, UserError
from engram.data.loader import Loader
from engram.distributed.world import World
from engram.training import random_state
from engram.training.checkpoint import FORMAT, Checkpoint, CheckpointError, hash_recipe
from engram.training.checkpoint_files import Contents, other_checkpoint
from engram.training.engine import Engine
from engram.training.setup import RunData, environment

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    config: Config
    data: RunData
    device: torch.device
    engine: Engine
    loader: Loader
    world: World
    # Finished steps, and those among them that were skipped for a non-finite loss or gradient.
    step: int = 0
    skipped: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0

    @property
    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    def contents(self) -> Contents:
        """Everything that resuming needs."""
        state = {
            "format": FORMAT,
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "best_step": self.best_step,
            "loader": self.loader.state_dict(),
            "optimizer": self.engine.scalars(),
            "rng": random_state.capture(),
            "hash_recipe": hash_recipe(self.engine.model),
            **self.identity(),
            "environment": environment(self.device, self.world.size),
        }
        return Contents(self.engine.tensors(), state, self.config, self.data.tokenizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError: other data, tokenizer, hash recipe or shapes; damaged."""
        try:
            self._restore(checkpoint)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.folder / 'state.json'}: is damaged ({type(error).__name__}: {error}): "
                + other_checkpoint(checkpoint.folder)
            ) from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        for part, digest in self.identity().items():
            if state[part] != digest:
                raise CheckpointError(
                    f"{checkpoint.folder / 'state.json'}: {part} was {state[part][:12]}..., but data.path "
                    f"{self.config.data.path} has {digest[:12]}...: point data.path to the data that the run started "
                    "with, or choose another run_dir"
                )
        self.engine.restore(checkpoint)
        self.loader.load_state_dict(state["loader"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
        self.best_step = state["best_step"]
        random_state.restore(state["rng"])
        self._warn_of_differences(state["environment"])

    def identity(self) -> dict[str, str]:
        """Digests of tokenizer and training documents, which a checkpoint is bound to."""
        training = self.data.training.manifest.splits["train"]
        return {"tokenizer_digest": self.data.tokenizer.digest, "data_digest": training.digest}

    def _warn_of_differences(self, saved: dict[str, Any]) -> None:
        now = environment(self.device, self.world.size)
        # The number of ranks is not told where it is one.
        keys = dict.fromkeys((*now, *saved))
        changed = [
            f"{key} was {saved.get(key, 1)}, is {now.get(key, 1)}" for key in keys if saved.get(key) != now.get(key)
        ]
        if changed:
            logger.warning("resuming is exact to the bit only where nothing changed; here: %s", "; ".join(changed))
