"""Loss of every run of a part over its tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import EngFormatter, MaxNLocator

from engram.report.figure import SavedFigure, save
from engram.report.style import COLOURS, applied
from engram.sweep.figures.drawing import Data, panels
from engram.sweep.spec import file_name
from engram.sweep.tables import Row

# All memory to all experts; no shade of it fades into a light or a dark page.
_SHARES = LinearSegmentedColormap.from_list("shares", [COLOURS[1], COLOURS[3], COLOURS[0]])
# The first losses lie far above the rest: what comes before this share of the tokens may leave the panel at its top.
_SHOWN_FROM = 0.15
# Fewer evaluations make no curve: then the training loss is shown.
_FEWEST = 3


def runs_figure(
    name: str, rows: Sequence[Row], curves: Mapping[str, Sequence[Row]], folder: Path
) -> SavedFigure | None:
    """One thin line for each run, coloured by the experts' share of its sparse parameters; a panel for each length.

    `curves`: logged steps by run id. None where no run of `rows` has any.
    """
    runs = {row["run_id"]: row for row in rows if row["status"] == "done" and curves.get(row["run_id"])}
    lengths = sorted({row["tokens"] for row in runs.values()})
    if not runs:
        return None
    data = Data("run_id", "rho_counted", "seed", "step", "tokens", "loss", "val_loss")
    shares = [row["rho_counted"] for row in runs.values()]
    scale = ScalarMappable(Normalize(min(shares), max(shares)), _SHARES)
    with applied():
        figure, axes, _ = panels(len(lengths), height=2.2)
        for axis, tokens in zip(axes, lengths, strict=True):
            chosen = {run_id: row for run_id, row in runs.items() if row["tokens"] == tokens}
            evaluated = [sum(line["val_loss"] is not None for line in curves[run_id]) for run_id in chosen]
            key = "val_loss" if min(evaluated) >= _FEWEST else "loss"
            tops, lows = [], []
            for run_id, row in chosen.items():
                points = [(line["tokens"], line[key]) for line in curves[run_id] if line[key] is not None]
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True), color=scale.to_rgba(row["rho_counted"]), linewidth=0.7, alpha=0.85
                )
                tops.append(max((loss for at, loss in points if at >= _SHOWN_FROM * tokens), default=points[-1][1]))
                lows.append(min(loss for _, loss in points))
            if tops and max(tops) > min(lows):
                axis.set_ylim(min(lows) - 0.05 * (max(tops) - min(lows)), max(tops))
            axis.set_xlim(0, tokens)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlabel("tokens")
            axis.set_ylabel("validation loss" if key == "val_loss" else "training loss")
            axis.set_title(f"{len(chosen)} runs of {chosen[next(iter(chosen))]['steps']:,} steps")
        if max(shares) > min(shares):
            bar = figure.colorbar(scale, ax=axes, fraction=0.04, pad=0.02)
            bar.set_label("experts' share ρ")
            bar.outline.set_visible(False)
        for run_id, row in runs.items():
            for line in curves[run_id]:
                which = {key: line[key] for key in ("step", "tokens", "loss", "val_loss")}
                data.add(run_id=run_id, rho_counted=row["rho_counted"], seed=row["seed"], **which)
        return save(figure, data.columns, folder, file_name(name, "runs"))
