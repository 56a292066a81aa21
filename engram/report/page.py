"""A page of results in one HTML file: no scripts, no external resource, light and dark."""

import base64
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from engram.report.figure import SavedFigure
from engram.report.style import STYLE_SHEET

_NUMBER = re.compile(r"[-+−±]?\d[\d,.]*(e[-+]?\d+)?\s*(%|[kMBTG]|[KMGT]?i?B|s|nat)?")


class Page:
    """Blocks in reading order. Text that callers pass is escaped, except in `html`."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[str] = []
        self._blocks: list[str] = []

    def section(self, heading: str, introduction: str = "") -> None:
        """Start a section, which the page's first lines link to."""
        self._sections.append(heading)
        self.html(f'<h2 id="{_slug(heading)}">{escape(heading)}</h2>')
        if introduction:
            self.text(introduction)

    def heading(self, text: str) -> None:
        self.html(f"<h3>{escape(text)}</h3>")

    def text(self, text: str) -> None:
        self.html(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        self.html(f'<p class="note">{escape(text)}</p>')

    def tiles(self, tiles: Iterable[tuple[str, str]]) -> None:
        """The few (value, label) pairs that a reader looks for first."""
        cells = "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
        )
        self.html(f'<div class="tiles">{cells}</div>')

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", strong: Sequence[int] = ()
    ) -> None:
        """Rows below `header`; columns of numbers align right; rows whose index is in `strong` are bold."""
        body = [[str(cell) for cell in row] for row in rows]
        numeric = [column > 0 and all(_is_number(row[column]) for row in body) for column in range(len(header))]
        head = _cells("th", header, numeric)
        starts = ('<tr class="strong">' if index in strong else "<tr>" for index in range(len(body)))
        lines = "".join(f"{start}{_cells('td', row, numeric)}</tr>" for start, row in zip(starts, body, strict=True))
        described = f"<caption>{escape(caption)}</caption>" if caption else ""
        self.html(
            f'<div class="scroll"><table>{described}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        )

    def figure(self, figure: SavedFigure, caption: str) -> None:
        """The drawing, what it shows, and a link that holds the numbers behind it."""
        self.html(f"<figure>{figure.svg}{_caption(caption, figure.name, figure.csv)}</figure>")

    def image(self, png: bytes, caption: str) -> None:
        """A bitmap, such as a heat map with too many cells for a drawing."""
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        self.html(f'<figure><img alt="{escape(caption)}" src="{source}">{_caption(caption)}</figure>')

    def quote(self, text: str, lead: str = "") -> None:
        """A text as a model wrote it, after the `lead` that it was given."""
        self.html(f"<blockquote><mark>{escape(lead)}</mark>{escape(text)}</blockquote>")

    def details(self, summary: str, text: str) -> None:
        """Preformatted text that opens on a click."""
        self.html(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def columns(self, parts: Sequence["Page"]) -> None:
        """The blocks of other pages side by side, as far as the screen is wide enough."""
        cells = "".join(f"<div>{''.join(part._blocks)}</div>" for part in parts)
        self.html(f'<div class="columns">{cells}</div>')

    def html(self, markup: str) -> None:
        self._blocks.append(markup)

    def render(self) -> str:
        links = "".join(f'<a href="#{_slug(heading)}">{escape(heading)}</a>' for heading in self._sections)
        navigation = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        blocks = "\n".join(self._blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n"
            f'<header>\n<h1>{escape(self.title)}</h1>\n<p class="subtitle">{escape(self.subtitle)}</p>\n'
            f"{navigation}\n</header>\n"
            f"<main>\n{blocks}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page in one step, so that a reader never sees half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.render(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _is_number(text: str) -> bool:
    return text in ("", "–") or _NUMBER.fullmatch(text.strip()) is not None


def _cells(tag: str, texts: Sequence[str], numeric: Sequence[bool]) -> str:
    pairs = zip(texts, numeric, strict=True)
    return "".join(f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>" for text, right in pairs)


def _caption(caption: str, name: str = "", data: str = "") -> str:
    encoded = base64.b64encode(data.encode()).decode()
    link = f' <a download="{escape(name)}.csv" href="data:text/csv;base64,{encoded}">Data (CSV)</a>' if data else ""
    return f"<figcaption>{escape(caption)}{link}</figcaption>"
