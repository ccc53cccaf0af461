"""SVG for a page: text stays text, colours follow the page's theme, equal input gives equal bytes.

Each chart is drawn twice, for a desk and for a phone, since a shrunk chart has unreadable text.
Colours are written as CSS variables after drawing; matplotlib sees them as fixed stand-ins.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

WIDE, NARROW = 720, 350
# Stand-in colour -> CSS variable of the page. Each must occur nowhere else.
INK, MUTED, GRID, ZONE = "#1b1d21", "#5b616a", "#dfe1e4", "#d9efe9"
PAPER = "#fdfdfb"
WORD = {
    "protects": "#0a7561",
    "leaks": "#c0341d",
    "useless": "#8a6205",
    "inconclusive": "#3f5f9e",
    "not measured": "#5b616b",
}
MARK = {"protects": "o", "leaks": "^", "useless": "s", "inconclusive": "v", "not measured": "D"}
_THEME = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ZONE: "--zone",
    PAPER: "--paper",
    **{colour: f"--{word.replace(' ', '-')}" for word, colour in WORD.items()},
}


def to_svg(draw: Callable[..., Any], rows: Any, width: int, index: int, title: str) -> str | None:
    """``draw(figure, rows, width)`` as an ``<svg>``; None where it had nothing to draw.

    Raises ``ImportError`` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install lcguard[eval]") from error
    name = f"c{index}{'w' if width == WIDE else 'n'}"
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a guard's name may hold a dollar sign
        "font.family": ["DejaVu Sans"],
        "font.size": 12 if width == WIDE else 11,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has the glyph
        figure = Figure()
        if not draw(figure, rows, width):
            return None
        blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=blank)
    return _embed(buffer.getvalue().decode(), name, title)


def _embed(svg: str, name: str, title: str) -> str:
    """An ``<svg>`` that can stand beside others in a page: own ids, theme colours, a name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id|xlink:href)="(#?)', rf'\1="\2{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)

    def recolour(match: re.Match[str]) -> str:
        style = match.group(0)
        for colour, variable in _THEME.items():
            style = style.replace(colour, f"var({variable})")
        return style

    return re.sub(r'style="[^"]*"', recolour, svg)


def add_axes(figure: Any, size: tuple[float, float], box: tuple[float, float, float, float]) -> Any:
    """Axes inside margins (left, right, top, bottom), all in px."""
    (width, height), (left, right, top, bottom) = size, box
    figure.set_size_inches(width / 72, height / 72)
    inner = (width - left - right) / width, (height - top - bottom) / height
    axes = figure.add_axes((left / width, bottom / height, *inner))
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    return axes


def percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def short(name: Any, limit: int) -> str:
    text = "".join(c for c in str(name) if c.isprintable())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions at least ``gap`` apart, as near to the wanted ones as a sweep gets."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, i in zip([None, *order], order, strict=False):
        placed[i] = max(wanted[i], low if before is None else placed[before] + gap)
    limit = high
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def legend(figure: Any, keys: list[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker=mark,
            mfc=fill,
            mec=INK if fill == PAPER else fill,
            ms=9 if mark != "|" else 12,
            mew=1.8 if mark in "|D" or fill == PAPER else 0,
            label=label,
        )
        for mark, fill, label in keys
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=len(keys),
        frameon=False,
        labelcolor=MUTED,
        borderaxespad=0.2,
        handletextpad=0.2,
        columnspacing=1.2,
    )
