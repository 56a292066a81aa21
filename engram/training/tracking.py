"""Weights & Biases, when it is there: a run never fails because of it."""

import logging
from pathlib import Path
from typing import Any

from engram.config import Config

logger = logging.getLogger(__name__)


class Tracker:
    """Sends metrics to W&B, or does nothing: `disabled`, not installed, or not working (one warning says why)."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        self._run: Any = None
        settings = config.train.wandb
        if settings.mode == "disabled":
            return
        try:
            # Imported late: it takes half a second, and training works without it.
            import wandb

            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                dir=run_dir,
                id=run_id,
                name=run_dir.name,
                resume="allow" if settings.mode == "online" else None,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        # Whatever goes wrong in there (no package, no key, no network, no space), training goes on.
        except Exception as error:
            self._give_up(error)

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.log(metrics, step=metrics["step"])
            except Exception as error:
                self._give_up(error)

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("W&B is off for this run: %s (train.wandb.mode=disabled avoids this line)", reason)
