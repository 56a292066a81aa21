"""Plain text out of HTML, reStructuredText and POD.

Light cleaning: marks that carry no meaning in plain text go, wording, code and layout stay.
"""

import re
from html.parser import HTMLParser


def tidy(text: str) -> str:
    """No spaces at ends of lines, at most one empty line in a row, one newline at the end."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


# ---------------------------------------------------------------------------------------------------------------- HTML

_VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
_SKIPPED = re.compile("head|script|style|noscript|nav|header|footer|aside|button|svg")
_PARAGRAPH = re.compile("p|div|section|article|h[1-6]|ul|ol|dl|table|pre|blockquote|figure")
_LINE = re.compile("br|li|dt|dd|tr|caption")
# Marks of where lines and paragraphs begin and end; a run of them is one break, with the collapsed spaces around it,
# but not with the indentation that follows inside of <pre>.
_NEW_LINE, _NEW_PARAGRAPH = "\1", "\2"
_BREAKS = re.compile("(?: ?[\1\2])+(?: (?! ))?")


class _HtmlText(HTMLParser):
    def __init__(self, root_id: str | None, skipped: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self._root_id, self._skipped = root_id, skipped
        # Open elements, each with whether its text counts and whether its white space does.
        self._open: list[tuple[str, bool, bool]] = [("", root_id is None, False)]
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)
        if _VOID.fullmatch(tag):
            return
        attributes = dict(attrs)
        _, counts, verbatim = self._open[-1]
        if self._root_id is not None and attributes.get("id") == self._root_id:
            counts = True
        names = f"{attributes.get('class')} {attributes.get('id')}".split()
        if _SKIPPED.fullmatch(tag) or self._skipped.intersection(names):
            counts = False
        self._open.append((tag, counts, verbatim or tag == "pre"))

    def handle_endtag(self, tag: str) -> None:
        if _VOID.fullmatch(tag):
            return
        if any(tag == name for name, _, _ in self._open):
            while self._open.pop()[0] != tag:
                pass
        if tag not in ("td", "th"):
            self._break(tag)

    def handle_data(self, data: str) -> None:
        _, counts, verbatim = self._open[-1]
        if counts:
            self.parts.append(data if verbatim else re.sub(r"[ \t\n\r\f]+", " ", data))

    def _break(self, tag: str) -> None:
        if self._open[-1][1]:
            if _PARAGRAPH.fullmatch(tag):
                self.parts.append(_NEW_PARAGRAPH)
            elif _LINE.fullmatch(tag):
                self.parts.append(_NEW_LINE)
            elif tag in ("td", "th"):
                self.parts.append(" ")


def html_to_text(html: str, root_id: str | None = None, skipped: frozenset[str] = frozenset()) -> str:
    """Text of an HTML page, or of its element `root_id`, without navigation and what has a class or id in `skipped`."""
    parser = _HtmlText(root_id, skipped)
    parser.feed(html)
    parser.close()
    return tidy(_BREAKS.sub(lambda found: "\n\n" if _NEW_PARAGRAPH in found[0] else "\n", "".join(parser.parts)))


# ---------------------------------------------------------------------------------------------------- reStructuredText

# Directives that steer the layout; they go together with their indented blocks.
_RST_LAYOUT = re.compile(
    r"(index|module|currentmodule|moduleauthor|sectionauthor|toctree|highlight|testsetup|testcleanup|include|contents|"
    r"image|figure|raw|kernel-doc|kernel-figure|kernel-include|kernel-feat|kernel-abi|only|tabularcolumns|sectnum|role|"
    r"default-role|flat-table|rst-class|cssclass)::"
)
_RST_EXPLICIT = re.compile(r"( *)\.\.(?: +(.*))?$")
_RST_RULE = re.compile(r"\s*([=\-~^\"'*+#.`:_])\1{3,}\s*")
# Literals come first: what looks like a mark inside of them is none.
_RST_INLINE = re.compile(
    r"""
    ``(?P<literal>[^`]+)``
    | (?: :(?P<role>[\w+.:-]+): )? `[!~]?(?P<text>[^`<>]{1,200}?) (?: \s* <[^`>]+> )? `_{0,2}
    | (?<![\w*/]) (?P<stars>\*\*?) (?P<strong>\S|\S[^*\n]*\S) (?P=stars) (?![\w*/])
    """,
    re.VERBOSE,
)


def rst_to_text(source: str) -> str:
    """reStructuredText without comments, targets, layout directives, rules under titles, and inline marks."""
    kept: list[str] = []
    # Indentation of the explicit block that is being left out.
    skipped: int | None = None
    for line in source.expandtabs().splitlines():
        indentation = len(line) - len(line.lstrip())
        if skipped is not None and (not line.strip() or indentation > skipped):
            continue
        skipped = None
        explicit = _RST_EXPLICIT.match(line)
        if explicit:
            body = explicit[2] or ""
            if _RST_LAYOUT.match(body) or body.startswith("_") or not re.match(r"\[|\|?[\w:+.-]+(\|.*)?::", body):
                skipped = indentation
                continue
            kept.append(re.sub(r"\.\. +([\w:+.-]+):: ?", lambda found: f"{found[1]}: ", line).rstrip())
        elif not _RST_RULE.fullmatch(line):
            kept.append(line)
    text = _RST_INLINE.sub(_rst_inline, "\n".join(kept))
    # `example::` announces a literal block.
    return tidy(re.sub(r"(?m)(?<=\S)::$", ":", text))


def _rst_inline(found: re.Match[str]) -> str:
    if found["role"] in ("rfc", "pep"):
        return f"{found['role'].upper()} {found['text']}"
    return found["literal"] or found["text"] or found["strong"]


# ----------------------------------------------------------------------------------------------------------------- POD

_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|", "amp": "&", "quot": '"', "nbsp": " "}
# Innermost codes first: C<text>, or C<< text with > inside >>.
_POD_CODE = re.compile(r"([BCEFILSXZ])(?:<<<\s(.+?)\s>>>|<<\s(.+?)\s>>|<([^<>]*)>)", re.DOTALL)


def pod_to_text(source: str) -> str:
    """Perl's POD without commands and formatting codes; verbatim paragraphs (indented ones) stay as they are."""
    paragraphs = []
    bullet, is_pod, is_foreign = "", False, False
    for paragraph in re.split(r"(?:\n[ \t]*)+\n", source.expandtabs()):
        command, _, rest = paragraph.strip().partition(" ") if paragraph.lstrip("\n").startswith("=") else ("", "", "")
        is_pod = command != "=cut" if command else is_pod
        if command in ("=begin", "=end"):
            is_foreign = command == "=begin"
        elif not is_pod or is_foreign or command in ("=for", "=encoding", "=over", "=back", "=pod"):
            continue
        elif command == "=item":
            # A bullet alone belongs to the paragraph after it.
            bullet = "* " + _pod_inline(rest.strip().removeprefix("*").strip())
            if bullet != "* ":
                paragraphs.append(bullet)
                bullet = ""
        elif command:
            paragraphs.append(_pod_inline(rest.strip()))
        else:
            text = paragraph.lstrip("\n")
            paragraphs.append(bullet + (text if text[:1].isspace() else _pod_inline(text)))
            bullet = ""
    return tidy("\n\n".join(paragraphs))


def _pod_inline(text: str) -> str:
    # Escapes come last: the < and > that they stand for are no codes.
    previous = None
    while text != previous:
        previous, text = text, _POD_CODE.sub(_pod_code, text)
    return re.sub("\0(\\w+)\0", lambda found: _pod_escape(found[1]), text)


def _pod_code(found: re.Match[str]) -> str:
    body = next((group for group in found.groups()[1:] if group is not None), "")
    match found[1]:
        case "X" | "Z":
            return ""
        case "E":
            return f"\0{body}\0"
        case "L":
            # L<text|target>, or L<page/"section">.
            text, bar, _ = body.partition("|")
            return text if bar or "://" in body else body.replace('"', "").strip("/").replace("/", ", ")
    return body


def _pod_escape(name: str) -> str:
    if name in _POD_ESCAPES:
        return _POD_ESCAPES[name]
    return chr(int(name, 0)) if re.fullmatch(r"0x[0-9a-fA-F]+|[1-9]\d*", name) else name
