"""Tokens of a text coloured by values in [0, 1]: one row of text per named series, aligned with each other."""

from collections.abc import Sequence
from html import escape

# Whitespace that would otherwise be invisible or break a row.
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def heat_rows(
    labels: Sequence[str], tokens: Sequence[str], values: Sequence[Sequence[float]], titles: Sequence[Sequence[str]]
) -> str:
    """HTML of len(labels) rows of the same tokens; the background of token t in row r is as opaque as `values[r][t]`.

    `titles[r][t]` shows while the pointer rests on the token. Needs `engram.report.style.STYLE_SHEET`.
    """
    rows = []
    for label, row_values, row_titles in zip(labels, values, titles, strict=True):
        spans = "".join(
            f'<span style="--value: {value:.3f}" title="{escape(title)}">{_visible(token)}</span>'
            for token, value, title in zip(tokens, row_values, row_titles, strict=True)
        )
        rows.append(f"<span>{escape(label)}</span><p>{spans}</p>")
    return f'<div class="heat">{"".join(rows)}</div>'


def heat_scale() -> str:
    """HTML of the legend: the colours from 0 to 1."""
    return '<p class="note">0 <span class="scale"></span> 1</p>'


def _visible(token: str) -> str:
    return escape(token.translate(_VISIBLE)) or "∅"
