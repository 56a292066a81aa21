"""Pages: everything escaped, everything inside, nothing fetched."""

import base64
import re
from html.parser import HTMLParser

import pytest

from engram.report.figure import SavedFigure
from engram.report.page import Page

_VOID = {"meta", "img", "br", "link"}


class _Nesting(HTMLParser):
    """Collects text by tag, and fails where an element is closed that is not the innermost open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(html: str) -> _Nesting:
    parser = _Nesting()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def full_page() -> Page:
    page = Page("A <title> & more", "sub < title")
    page.section("First part", "An <i>introduction</i>.")
    page.tiles([("3.14", "a < b")])
    page.table(["name", "value"], [["<b>", "1.5"], ["second", "-2,000.0"]], "cap & tion", strong=[1])
    page.figure(SavedFigure("curve", "<svg viewBox='0 0 1 1'></svg>", "x,y\n1,2\n"), "A figure. ")
    page.image(b"\x89PNG", "A bitmap")
    page.section("Second part")
    page.heading("A <heading>")
    page.note("note & more")
    page.quote("</blockquote><script>alert(1)</script>", lead="lead & ")
    page.details("more", "a < b\nc")
    part = Page("part")
    part.text("left")
    page.columns([part, part])
    return page


def test_markup_nests_and_text_is_escaped() -> None:
    parser = parse(full_page().render())
    text = "".join(parser.texts)
    for expected in (
        "A <title> & more",
        "sub < title",
        "An <i>introduction</i>.",
        "a < b",
        "<b>",
        "cap & tion",
        "A <heading>",
        "note & more",
        "lead & ",
        "</blockquote><script>alert(1)</script>",
        "a < b\nc",
    ):
        assert expected in text
    assert "script" not in {tag for tag, _ in parser.found}


def test_nothing_is_fetched_from_outside() -> None:
    html = full_page().render()
    assert "http://" not in html and "https://" not in html and "@import" not in html and "<link" not in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 4
    assert all(source.startswith(("#", "data:")) for source in sources)


def test_sections_are_linked_to_their_headings() -> None:
    parser = parse(full_page().render())
    links = [attributes["href"] for tag, attributes in parser.found if tag == "a" and "download" not in attributes]
    headings = [attributes["id"] for tag, attributes in parser.found if tag == "h2"]
    assert links == ["#first-part", "#second-part"] and headings == ["first-part", "second-part"]


def test_figure_carries_its_data() -> None:
    parser = parse(full_page().render())
    link = next(attributes for tag, attributes in parser.found if attributes.get("download") == "curve.csv")
    assert base64.b64decode(str(link["href"]).split(",", 1)[1]) == b"x,y\n1,2\n"
    image = next(attributes for tag, attributes in parser.found if tag == "img")
    assert base64.b64decode(str(image["src"]).split(",", 1)[1]) == b"\x89PNG"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.5", True),
        ("-2,000.0", True),
        ("+0.123", True),
        ("1e-05", True),
        ("12 %", True),
        ("3.1 M", True),
        ("975 K", True),
        ("–", True),
        ("", True),
        ("3 words here", False),
        ("bigram", False),
        ("2.13.0+cpu", False),
    ],
)
def test_numbers_align_right(text: str, number: bool) -> None:
    page = Page("t")
    page.table(["a", "b"], [["x", text]])
    cells = [attributes for tag, attributes in parse(page.render()).found if tag in ("td", "th")]
    assert [cell.get("class") for cell in cells] == [
        None,
        "number" if number else None,
        None,
        "number" if number else None,
    ]


def test_bold_rows() -> None:
    page = Page("t")
    page.table(["a"], [["x"], ["y"], ["z"]], strong=[1])
    rows = [attributes.get("class") for tag, attributes in parse(page.render()).found if tag == "tr"]
    assert rows == [None, None, "strong", None]


def test_write_leaves_only_the_page(tmp_path) -> None:
    path = full_page().write(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == full_page().render()
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_column_aligns_as_a_whole() -> None:
    page = Page("t")
    page.table(["a", "b", "c"], [["1", "2", "3"], ["4", "five", "–"]])
    cells = [attributes.get("class") for tag, attributes in parse(page.render()).found if tag == "td"]
    assert cells == [None, None, "number"] * 2


def chapters() -> Page:
    page = Page("All", "of them")
    page.section("Opening")
    page.chapter("First <chapter>", full_page())
    page.chapter("Second", full_page())
    return page


def test_chapters_hold_whole_pages_with_anchors_of_their_own() -> None:
    svg = '<svg><g id="curve-a"></g><use href="#curve-a"></use><path clip-path="url(#curve-a)"></path></svg>'
    inner = Page("Inner", "its subtitle")
    inner.section("Part")
    inner.figure(SavedFigure("curve", svg, ""), "")
    page = Page("All")
    page.chapter("One", inner)
    page.chapter("Two", inner)
    html = page.render()
    for name in ("one", "two"):
        for anchor in (f'id="{name}-curve-a"', f'href="#{name}-curve-a"', f"url(#{name}-curve-a)"):
            assert html.count(anchor) == 1
    assert html.count("its subtitle") == 2 and "curve-a" in inner.render()


def test_contents_link_to_every_heading_of_a_chapter() -> None:
    parser = parse(chapters().render())
    links = [str(attributes["href"]) for tag, attributes in parser.found if tag == "a" and "download" not in attributes]
    headings = [(tag, str(attributes["id"])) for tag, attributes in parser.found if tag in ("h2", "h3") and attributes]
    assert [f"#{anchor}" for _, anchor in headings] == links
    assert headings == [
        ("h2", "opening"),
        ("h2", "first-chapter"),
        ("h3", "first-chapter-first-part"),
        ("h3", "first-chapter-second-part"),
        ("h2", "second"),
        ("h3", "second-first-part"),
        ("h3", "second-second-part"),
    ]
    # A heading inside of a section goes down too.
    assert [tag for tag, _ in parser.found].count("h4") == 2


def test_a_written_page_becomes_the_same_chapter(tmp_path) -> None:
    again = Page.read(full_page().write(tmp_path / "page.html"))
    assert again.render() == full_page().render()
    for page in (direct := Page("All"), read := Page("All")):
        page.chapter("One", full_page() if page is direct else again)
        page.section("End")
    assert read.render() == direct.render()


def test_another_file_is_no_page(tmp_path) -> None:
    (tmp_path / "other.html").write_text("<html><body><main>\n</main></body></html>")
    with pytest.raises(ValueError, match=r"other.html: is not a page"):
        Page.read(tmp_path / "other.html")
