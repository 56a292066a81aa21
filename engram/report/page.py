"""A page of results in one HTML file: no scripts, no external resource, light and dark."""

import base64
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path

from engram.report.figure import SavedFigure
from engram.report.style import STYLE_SHEET

_NUMBER = re.compile(r"[-+−±]?\d[\d,.]*(e[-+]?\d+)?\s*(%|[kKMBTG]|[KMGT]?i?B|s|nat)?")

# All text is escaped: a tag in a page is one that is written here, by a figure or by a heat map.
_HEADING = re.compile(r"<(/?)h([2-5])\b")
_SECTION = re.compile(r'<h2 id="([^"]*)">(.*?)</h2>')
_ANCHOR = re.compile(r'\bid="|url\(#|\bhref="#')
_WRITTEN = re.compile(
    r'<header>\n<h1>(?P<title>.*?)</h1>\n<p class="subtitle">(?P<subtitle>.*?)</p>\n'
    r".*?</header>\n<main>\n(?P<blocks>.*)\n</main>\n</body>",
    re.DOTALL,
)


@dataclass
class _Entry:
    """A line of the contents: a heading, its place on the page, and the headings below it."""

    anchor: str
    heading: str
    below: list["_Entry"] = field(default_factory=list)


class Page:
    """Blocks in reading order. Text that callers pass is escaped, except in `html`."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[_Entry] = []
        self._blocks: list[str] = []

    def section(self, heading: str, introduction: str = "") -> None:
        """Start a section, which the page's first lines link to."""
        self._sections.append(_Entry(_slug(heading), heading))
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

    def chapter(self, heading: str, page: "Page") -> None:
        """A whole other page as a section: its headings move down by one, and its anchors get a prefix of their own."""
        self.section(heading, page.subtitle)
        prefix = _slug(heading)
        self._sections[-1].below = [_Entry(f"{prefix}-{entry.anchor}", entry.heading) for entry in page._sections]
        for block in page._blocks:
            block = _HEADING.sub(lambda tag: f"<{tag[1]}h{int(tag[2]) + 1}", block)
            self.html(_ANCHOR.sub(lambda start: f"{start[0]}{prefix}-", block))

    def html(self, markup: str) -> None:
        self._blocks.append(markup)

    def render(self) -> str:
        blocks = "\n".join(self._blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n"
            f'<header>\n<h1>{escape(self.title)}</h1>\n<p class="subtitle">{escape(self.subtitle)}</p>\n'
            f"{self._contents()}\n</header>\n"
            f"<main>\n{blocks}\n</main>\n</body>\n</html>\n"
        )

    def _contents(self) -> str:
        """Links to all sections; where one is a chapter, a line for each with its own sections behind it."""
        if len(self._sections) < 2:
            return ""
        if not any(entry.below for entry in self._sections):
            return f"<nav>{''.join(map(_link, self._sections))}</nav>"
        lines = (f"<p>{''.join(map(_link, (entry, *entry.below)))}</p>" for entry in self._sections)
        return f'<nav class="chapters">{"".join(lines)}</nav>'

    @classmethod
    def read(cls, path: str | Path) -> "Page":
        """A page that `write` left, to become a chapter of another one. Raises ValueError for any other file."""
        text = Path(path).read_text(encoding="utf-8")
        found = _WRITTEN.search(text)
        if found is None:
            raise ValueError(f"{path}: is not a page that this program wrote")
        page = cls(unescape(found["title"]), unescape(found["subtitle"]))
        page._sections = [_Entry(anchor, unescape(heading)) for anchor, heading in _SECTION.findall(found["blocks"])]
        page.html(found["blocks"])
        return page

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


def _link(entry: _Entry) -> str:
    return f'<a href="#{entry.anchor}">{escape(entry.heading)}</a>'


def _is_number(text: str) -> bool:
    return text in ("", "–") or _NUMBER.fullmatch(text.strip()) is not None


def _cells(tag: str, texts: Sequence[str], numeric: Sequence[bool]) -> str:
    pairs = zip(texts, numeric, strict=True)
    return "".join(f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>" for text, right in pairs)


def _caption(caption: str, name: str = "", data: str = "") -> str:
    encoded = base64.b64encode(data.encode()).decode()
    link = f' <a download="{escape(name)}.csv" href="data:text/csv;base64,{encoded}">Data (CSV)</a>' if data else ""
    return f"<figcaption>{escape(caption)}{link}</figcaption>"
