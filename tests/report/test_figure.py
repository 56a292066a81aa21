"""Figures: four files, the data exact, the drawing ready for a light and a dark page."""

import csv
import io
import re

import matplotlib
import pytest

from engram.report.figure import inline_svg, new_figure, save, to_csv
from engram.report.style import COLOURS, INK, STYLE_SHEET, VARIABLES, applied

DATA = {"x": [1, 2, 3], "y": [0.1, None, 0.30000000000000004], "name": ["a", 'b "quoted", comma', "c\nd"]}


def draw(folder, name="figure"):
    with applied():
        figure, (left, right) = new_figure(1, 2, height=2)
        left.plot([1, 2, 3], [1, 4, 2], marker="o", label="line")
        left.set_xlabel("tokens")
        left.legend()
        right.axhline(1, color=COLOURS[1])
    return save(figure, DATA, folder, name)


def test_files_and_their_kinds(tmp_path) -> None:
    saved = draw(tmp_path / "figures")
    start = {path.suffix: path.read_bytes()[:5] for path in (tmp_path / "figures").iterdir()}
    assert start == {".png": b"\x89PNG\r", ".pdf": b"%PDF-", ".svg": b"<?xml", ".csv": b"x,y,n"}
    assert (tmp_path / "figures" / "figure.csv").read_text() == saved.csv


def test_csv_keeps_every_digit_and_character() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(DATA))))
    assert [float(row["y"]) if row["y"] else None for row in rows] == DATA["y"]
    assert [row["name"] for row in rows] == DATA["name"]
    assert [int(row["x"]) for row in rows] == DATA["x"]


def test_unequal_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x': 2, 'y': 1"):
        to_csv({"x": [1, 2], "y": [1]})


def test_equal_figures_have_equal_bytes(tmp_path) -> None:
    draw(tmp_path / "a")
    draw(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_inlined_drawing_stands_alone(tmp_path) -> None:
    svg = draw(tmp_path, "one").svg
    assert svg.startswith("<svg viewBox=") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "<metadata" not in svg and "xmlns" not in svg
    identities = re.findall(r'\bid="([^"]+)"', svg)
    assert identities and all(identity.startswith("one-") for identity in identities)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert references and {a or b for a, b in references} <= set(identities)


def test_inlined_drawing_uses_the_pages_colours_and_fonts(tmp_path) -> None:
    svg = draw(tmp_path).svg
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) & {light for light, _ in VARIABLES.values()}
    assert "var(--ink)" in svg and "var(--series-0)" in svg and "var(--series-1)" in svg
    assert "DejaVu" not in svg and re.search(r"px var\(--font\)|font-family: var\(--font\)", svg)
    for name, (light, dark) in VARIABLES.items():
        assert f"--{name}: {light};" in STYLE_SHEET and f"--{name}: {dark};" in STYLE_SHEET


def test_saved_drawing_keeps_plain_colours(tmp_path) -> None:
    draw(tmp_path)
    text = (tmp_path / "figure.svg").read_text()
    assert INK[0] in text and "var(--" not in text


def test_inline_svg_touches_only_known_colours() -> None:
    drawing = f'<path id="p" style="fill: #123456; stroke: {COLOURS[2]}"/></svg>'
    svg = f'<?xml?><svg viewBox="0 0 4 2" width="4pt" xmlns="u">{drawing}'
    expected = '<svg viewBox="0 0 4 2" role="img"><path id="n-p" style="fill: #123456; stroke: var(--series-2)"/></svg>'
    assert inline_svg(svg, "n") == expected


def test_style_does_not_leak() -> None:
    before = dict(matplotlib.rcParams)
    with applied():
        assert matplotlib.rcParams["font.size"] == 9
    assert dict(matplotlib.rcParams) == before
