"""A figure never comes without the numbers behind it: `save` writes PNG, PDF, SVG and CSV side by side."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.report.style import FULL_WIDTH, VARIABLES, applied

# A figure with equal content has equal bytes: no dates and no version of the plotting library.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk (`FOLDER/NAME.{png,pdf,svg,csv}`), and what a page inlines of it."""

    name: str
    svg: str
    csv: str


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = FULL_WIDTH, height: float = 2.9, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches and its axes, row by row; needs no display and no global state."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
    return figure, list(axes.flat)


def save(figure: Figure, data: Mapping[str, Sequence[Any]], folder: str | Path, name: str) -> SavedFigure:
    """Write `FOLDER/NAME.png`, `.pdf`, `.svg`, and `data` (columns of equal length) as `.csv`."""
    text = to_csv(data)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, bytes] = {}
    with applied():
        # One layout for all formats: it takes longer than the drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for extension, metadata in _METADATA.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=extension, metadata=metadata, transparent=extension == "svg")
            drawings[extension] = buffer.getvalue()
    for extension, content in {**drawings, "csv": text.encode()}.items():
        (folder / f"{name}.{extension}").write_bytes(content)
    return SavedFigure(name, inline_svg(drawings["svg"].decode(), name), text)


def to_csv(data: Mapping[str, Sequence[Any]]) -> str:
    """Columns as CSV text; a missing value (None) is an empty cell. Raises ValueError for unequal lengths."""
    lengths = {name: len(column) for name, column in data.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of a figure's data differ in length: {lengths}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(data)
    writer.writerows(zip(*data.values(), strict=True))
    return buffer.getvalue()


def inline_svg(svg: str, prefix: str) -> str:
    """The <svg> element for use inside a page: own ids, the page's fonts, and the page's colours for light and dark."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\b(id="|url\(#|href="#)', lambda match: f"{match[1]}{prefix}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    names = {light: name for name, (light, _) in VARIABLES.items() if light.startswith("#")}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: f"var(--{names[match[0]]})" if match[0] in names else match[0], svg)
    # The page decides how wide a figure is; its proportions stay in the viewBox.
    return re.sub(r'^<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
