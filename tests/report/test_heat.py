"""Heat rows: each token once per row, with its own value."""

import re
from html import unescape

from engram.report.heat import heat_rows


def test_each_token_has_its_value_and_title() -> None:
    tokens = [" the", "<s>", "a\nb", "", '"']
    values = [[0.0, 0.25, 0.5, 1.0, 0.125], [1.0, 0.75, 0.0, 0.3333333, 0.9]]
    titles = [[f"row {row} column {column}" for column in range(5)] for row in range(2)]
    html = heat_rows(["first & row", "second"], tokens, values, titles)
    cells = re.findall(r'<span style="--value: ([\d.]+)" title="([^"]*)">(.*?)</span>', html)
    assert [float(value) for value, _, _ in cells] == [0.0, 0.25, 0.5, 1.0, 0.125, 1.0, 0.75, 0.0, 0.333, 0.9]
    assert [title for _, title, _ in cells] == sum(titles, [])
    assert [unescape(text) for _, _, text in cells] == [" the", "<s>", "a⏎b", "∅", '"'] * 2
    assert re.findall(r"<div class=\"heat\"><span>(.*?)</span>|</p><span>(.*?)</span>", html) == [
        ("first &amp; row", ""),
        ("", "second"),
    ]
