"""Which checkpoint of a run to compare with another run's last one: of equal loss, or of equal training compute.

The Engram paper compares long contexts at equal loss (46k steps against 50k) and at equal FLOPs (50k against 50k):
what a longer context makes of a model depends on how good the model was before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram.config import UserError
from engram.model.accounting import count_flops
from engram.training.checkpoint_files import read_config, step_folders, step_of
from engram.training.metrics import read_metrics

By = Literal["loss", "flops"]
# The nearest checkpoint may be so far away: checkpoints stand apart, and models differ in what a token costs.
FLOPS_APART = 0.1


@dataclass(frozen=True)
class Match:
    """A checkpoint, and that of the other run that it was matched with; losses in nats (None: not measured)."""

    folder: Path
    step: int
    tokens: int
    loss: float | None
    other: Path
    other_step: int
    other_tokens: int
    other_loss: float | None
    # Of the training up to here, where they were counted.
    flops: float | None = None
    other_flops: float | None = None

    def __str__(self) -> str:
        spent, other = ("" if each is None else f", {each:.3e} FLOPs" for each in (self.flops, self.other_flops))
        return (
            f"{self.folder} (step {self.step:,}, {self.tokens:,} tokens{spent}, loss {_text(self.loss)}) against "
            f"{self.other} (step {self.other_step:,}, {self.other_tokens:,} tokens{other}, loss "
            f"{_text(self.other_loss)})"
        )


def match(run: str | Path, other: str | Path, by: By) -> Match:
    """The checkpoint of `run` that is nearest to the end of `other`; of two equally near ones, the earlier.

    The other run's end is its newest checkpoint (`loss`: with a validation loss): what is matched is what is compared.
    `loss`: by the validation loss that the runs logged at these steps. `flops`: by the training's FLOPs so far, counted
    on the models. Raises UserError: no run folder, no checkpoint with what is compared, or none within FLOPS_APART.
    """
    run, other = Path(run), Path(other)
    ends, kept = _checkpoints(other, by), _checkpoints(run, by)
    end_folder, end = ends[-1]
    flops: tuple[float | None, float | None] = None, None
    if by == "loss":
        folder, line = min(kept, key=lambda pair: (abs(pair[1]["val_loss"] - end["val_loss"]), pair[1]["step"]))
    else:
        wanted = _flops(end_folder, end)
        spent = [_flops(*pair) for pair in kept]
        place = min(range(len(kept)), key=lambda index: abs(spent[index] - wanted))
        if abs(spent[place] - wanted) > FLOPS_APART * wanted:
            found = ", ".join(f"{each:.3e}" for each in spent)
            raise UserError(
                f"{run}: no checkpoint has taken {wanted:.3e} FLOPs, within {FLOPS_APART:.0%}, as {other} has at its "
                f"end (here: {found}): keep more with train.keep_checkpoints, or match by loss"
            )
        folder, line = kept[place]
        flops = spent[place], wanted
    return Match(
        folder,
        line["step"],
        line["tokens"],
        line.get("val_loss"),
        end_folder,
        end["step"],
        end["tokens"],
        end.get("val_loss"),
        *flops,
    )


def _checkpoints(run: Path, by: By) -> list[tuple[Path, dict[str, Any]]]:
    """The run's checkpoints, oldest first, each with its line of metrics: those that can be compared."""
    lines = {line["step"]: line for line in _metrics(run)}
    kept = [(folder, lines[step_of(folder)]) for folder in step_folders(run) if step_of(folder) in lines]
    if by == "loss":
        kept = [(folder, line) for folder, line in kept if line.get("val_loss") is not None]
    if not kept:
        where = "where the validation loss was measured" if by == "loss" else "at a step that was logged"
        raise UserError(
            f"{run}: no checkpoint stands {where}: make train.checkpoint_every a multiple of train.eval_every and "
            "train.log_every, and keep more with train.keep_checkpoints"
        )
    return kept


def _flops(folder: Path, line: dict[str, Any]) -> float:
    """Of the training up to a checkpoint."""
    config = read_config(folder)
    return float(count_flops(config.model, config.data.sequence_length).training * line["tokens"])


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    if not lines:
        raise UserError(f"{run}: has no metrics.jsonl with a step in it: give a run folder, not one of its checkpoints")
    return lines


def _text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"
