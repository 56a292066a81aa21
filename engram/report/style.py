"""One look for figures and pages: palette, matplotlib settings, style sheet.

Figures are drawn in the light palette; inside a page each of its colours becomes a CSS variable, so that one drawing
serves light and dark screens.
"""

from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from cycler import cycler

# Okabe and Ito's palette, which readers with any colour vision can tell apart, without its black and its yellow; the
# second of each pair is the same hue, lighter, for dark screens.
SERIES: tuple[tuple[str, str], ...] = (
    ("#0072b2", "#56a9e0"),
    ("#d55e00", "#f2894d"),
    ("#009e73", "#3cc49c"),
    ("#cc79a7", "#e2a3c5"),
    ("#e69f00", "#f4c152"),
    ("#56b4e9", "#9ad4f5"),
)
COLOURS: tuple[str, ...] = tuple(light for light, _ in SERIES)
INK = ("#1d2127", "#e4e6ea")
MUTED = ("#626a75", "#9aa3af")
LINE = ("#dfe2e7", "#353b44")
PAPER = ("#fdfdfc", "#16191d")
PANEL = ("#f3f4f5", "#1f2329")
# Red, green, blue of a value of 1 in heat maps; the value itself is the opacity.
HEAT = ("230 159 0", "190 102 0")

VARIABLES: dict[str, tuple[str, str]] = {
    "ink": INK,
    "muted": MUTED,
    "line": LINE,
    "paper": PAPER,
    "panel": PANEL,
    "heat": HEAT,
    **{f"series-{i}": pair for i, pair in enumerate(SERIES)},
}

# Widths in inches of a page's full and half column.
FULL_WIDTH, HALF_WIDTH = 6.8, 3.3

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK[0],
    "axes.edgecolor": MUTED[0],
    "axes.labelcolor": INK[0],
    "axes.titlecolor": INK[0],
    "xtick.color": MUTED[0],
    "ytick.color": MUTED[0],
    "xtick.labelcolor": INK[0],
    "ytick.labelcolor": INK[0],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE[0],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    # TrueType text in PDF, real text in SVG, and the same bytes from the same figure.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "engram",
}


def applied() -> AbstractContextManager[None]:
    """Context in which figures are made and saved: `with applied(): figure, (axis,) = new_figure(); ...`."""
    # Whatever the reader's own matplotlibrc says.
    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    settings |= _SETTINGS | {"axes.prop_cycle": cycler("color", list(COLOURS))}
    return matplotlib.rc_context(settings)


def _variables(dark: int) -> str:
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in VARIABLES.items())


STYLE_SHEET = f"""
:root {{ color-scheme: light dark; {_variables(0)}
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
@media print {{ :root {{ {_variables(0)} }} details > * {{ display: block; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--font); }}
h1 {{ margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.01em; }}
h2 {{ margin: 2.75rem 0 0.75rem; padding-top: 0.9rem; border-top: 1px solid var(--line); font-size: 1.2rem; }}
h3 {{ margin: 1.5rem 0 0.4rem; font-size: 1rem; }}
p {{ margin: 0.5rem 0; max-width: 46rem; }}
.subtitle, figcaption, caption, .note {{ color: var(--muted); font-size: 0.875rem; }}
a {{ color: var(--series-0); text-decoration: none; }} a:hover {{ text-decoration: underline; }}
nav {{ margin-top: 1rem; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.875rem; }}
nav.chapters {{ display: block; }} nav.chapters p {{ display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: 0.15rem 0;
  max-width: none; }} nav.chapters p a:first-child {{ min-width: 11rem; font-weight: 600; }}
h4 {{ margin: 1.25rem 0 0.4rem; font-size: 0.95rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 0.75rem 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
caption {{ caption-side: bottom; text-align: left; padding-top: 0.4rem; }}
th, td {{ padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
thead th {{ border-bottom: 1.5px solid var(--muted); font-weight: 600; white-space: nowrap; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }}
tr.strong td {{ font-weight: 650; }}
figure {{ margin: 1rem 0; }} figure svg, figure img {{ display: block; width: 100%; height: auto; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem;
  margin: 1.5rem 0; }}
.tile {{ padding: 0.75rem 0.9rem; border-radius: 0.5rem; background: var(--panel); }}
.tile b {{ display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.tile span {{ color: var(--muted); font-size: 0.8rem; }}
.columns {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 0.25rem 1.5rem; }}
.columns > * {{ min-width: 0; }}
pre, blockquote {{ margin: 0.5rem 0; padding: 0.8rem 1rem; border-radius: 0.5rem; background: var(--panel);
  white-space: pre-wrap; overflow-wrap: anywhere; }}
pre {{ font: 0.8rem/1.5 var(--mono); }} blockquote mark {{ background: none; color: var(--muted); }}
details {{ margin: 0.75rem 0; }} summary {{ cursor: pointer; color: var(--series-0); font-size: 0.9rem; }}
.heat {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1rem; margin: 0.5rem 0;
  font-size: 0.85rem; }}
.heat > span {{ color: var(--muted); font-variant-numeric: tabular-nums; }}
.heat p {{ margin: 0; max-width: none; font-family: var(--mono); line-height: 1.7; }}
.heat p span {{ display: inline-block; white-space: pre; padding: 0.05rem 0; margin-right: 1px; border-radius: 0.15rem;
  background: rgb(var(--heat) / var(--value)); }}
.scale {{ display: inline-block; width: 8rem; height: 0.7rem; border-radius: 0.15rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / 1)); outline: 1px solid var(--line); }}
"""
