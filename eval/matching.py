"""Which checkpoint of a run to compare with another run's last one: of equal loss, or of equal training compute.

The Engram paper compares long contexts at equal loss (46k steps against 50k) and at equal FLOPs (50k against 50k):
what a longer context makes of a model depends on how good the model was before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram.config import UserError
from engram.training.checkpoint_files import step_folders, step_of
from engram.training.metrics import read_metrics

By = Literal["loss", "flops"]


@dataclass(frozen=True)
class Match:
    """A checkpoint, and the other run's last state that it was matched with; losses in nats (None: not measured)."""

    folder: Path
    step: int
    tokens: int
    loss: float | None
    other: Path
    other_step: int
    other_tokens: int
    other_loss: float | None

    def __str__(self) -> str:
        return (
            f"{self.folder} (step {self.step:,}, {self.tokens:,} tokens, loss {_text(self.loss)}) against {self.other} "
            f"(step {self.other_step:,}, {self.other_tokens:,} tokens, loss {_text(self.other_loss)})"
        )


def match(run: str | Path, other: str | Path, by: By) -> Match:
    """The checkpoint of `run` that is nearest to the end of `other`; of two equally near ones, the earlier.

    `loss`: by the validation loss that the runs logged at these steps. `flops`: by tokens, as both runs of a comparison
    at equal FLOPs activate as many parameters for each token. Raises UserError: no run folder, no checkpoint with what
    is compared, or none of exactly as many tokens.
    """
    run, other = Path(run), Path(other)
    end = _end(other, by)
    lines = {line["step"]: line for line in _metrics(run)}
    kept = [(folder, lines[step_of(folder)]) for folder in step_folders(run) if step_of(folder) in lines]
    if by == "loss":
        kept = [(folder, line) for folder, line in kept if line.get("val_loss") is not None]
        if not kept:
            raise UserError(
                f"{run}: no checkpoint stands where the validation loss was measured: make train.checkpoint_every a "
                "multiple of train.eval_every, and keep more with train.keep_checkpoints"
            )
        folder, line = min(kept, key=lambda pair: (abs(pair[1]["val_loss"] - end["val_loss"]), pair[1]["step"]))
    else:
        same = [pair for pair in kept if pair[1]["tokens"] == end["tokens"]]
        if not same:
            found = ", ".join(f"{line['tokens']:,}" for _, line in kept) or "none"
            raise UserError(
                f"{run}: no checkpoint has seen {end['tokens']:,} tokens, as {other} has at its end (here: {found}): "
                "keep more with train.keep_checkpoints, or match by loss"
            )
        folder, line = same[0]
    return Match(
        folder,
        line["step"],
        line["tokens"],
        line.get("val_loss"),
        other,
        end["step"],
        end["tokens"],
        end.get("val_loss"),
    )


def _end(run: Path, by: By) -> dict[str, Any]:
    """The last line of metrics, or the last one with a validation loss."""
    lines = [line for line in _metrics(run) if by == "flops" or line.get("val_loss") is not None]
    if not lines:
        raise UserError(f"{run}: its metrics.jsonl has no validation loss: give another run, or match by flops")
    return lines[-1]


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    if not lines:
        raise UserError(f"{run}: has no metrics.jsonl with a step in it: give a run folder, not one of its checkpoints")
    return lines


def _text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"
