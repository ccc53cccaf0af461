"""The report's charts: what privacy costs, who was fooled, what leaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcguard.evaluation.results import CategoryFigures, GuardRow, Report
from lcguard.evaluation.svg import (
    GRID,
    INK,
    MARK,
    MUTED,
    NARROW,
    PAPER,
    WIDE,
    WORD,
    ZONE,
    add_axes,
    legend,
    percent_axis,
    short,
    spread,
    to_svg,
)
from lcguard.evaluation.verdict import ASR_MARGIN, UTILITY_SHARE, verdict


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    wide: str | None
    """SVG, or None where nothing was measured that it could show."""
    narrow: str | None


def charts(report: Report | Mapping[str, Any]) -> list[Chart]:
    """Frontier, training-time against fresh, and per-category, in this order.

    Raises ``ImportError`` without matplotlib.
    """
    rows = Report.of(report).results
    margin, share = f"{ASR_MARGIN * 100:.0f}", f"{UTILITY_SHARE:.0%}"
    plan: list[tuple[str, str, Callable[..., Any]]] = [
        (
            "What privacy costs",
            "Each mark is a guard: further right, the receiver works better; lower, a fresh "
            "attacker recovers less. The shaded corner is the verdict 'protects' (within "
            f"{margin} points of the floor, at least {share} of the utility).",
            _frontier,
        ),
        (
            "Fooling only one's own attacker",
            "From the attacker a guard was trained against (hollow) to one trained afresh on its "
            "output (filled). A long line is a guard that looked safe and was not.",
            _dumbbell,
        ),
        (
            "What leaks, by category",
            "Fresh attack success rate with its 95% interval, between what a blind attacker "
            "guesses (floor) and what unguarded segments give away (ceiling).",
            _categories,
        ),
    ]
    return [
        Chart(
            title, caption, to_svg(draw, rows, WIDE, i, title), to_svg(draw, rows, NARROW, i, title)
        )
        for i, (title, caption, draw) in enumerate(plan)
    ]


def _frontier(figure: Any, rows: Sequence[GuardRow], width: int) -> bool:
    points = []
    for row in rows:
        x, y = row.utility_share, row.asr_fresh
        if x is not None and y is not None:
            points.append((x, y, row))
    if not points:
        return False
    wide = width == WIDE
    height = 400 if wide else 340
    right = 150 if wide else 92
    axes = add_axes(figure, (width, height), (52, right, 30, 48))
    lines = {
        "floor": [r.floor for r in rows if r.floor is not None],
        "ceiling": [r.ceiling for r in rows if r.ceiling is not None],
    }
    top = max([p[1] for p in points] + lines["ceiling"] + [0.1]) * 1.1
    left = min(0.8, min(p[0] for p in points) - 0.06)
    axes.set_xlim(left, max(1.03, max(p[0] for p in points) + 0.02))
    axes.set_ylim(-0.02 * top, top)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if lines["floor"]:
        zone = (UTILITY_SHARE, axes.get_xlim()[1], min(lines["floor"]) + ASR_MARGIN)
        axes.fill_between(zone[:2], [axes.get_ylim()[0]] * 2, [zone[2]] * 2, color=ZONE, lw=0)
    for key, label in _LINES.items():
        if not lines[key]:
            continue
        low, high = min(lines[key]), max(lines[key])
        axes.axhspan(low, high, color=GRID, alpha=0.6, lw=0)
        axes.axhline(high, color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
        figures = f"{low:.1%}" if high - low < 0.0005 else f"{low:.1%} to {high:.1%}"
        axes.annotate(
            f"{label} {figures}", (left, high), (4, 4), textcoords="offset points", color=MUTED
        )
    gap = 16 / (height - 78) * top * 1.02
    spots = spread([p[1] for p in points], gap, 0.0, top)
    edge = axes.get_xlim()[1]
    for (x, y, row), spot in zip(points, spots, strict=True):
        word = verdict(row).word
        axes.plot([x, edge], [y, spot], color=WORD[word], lw=0.7, alpha=0.6, clip_on=False)
        axes.plot(x, y, MARK[word], color=WORD[word], ms=10, mec=PAPER, mew=0.8, clip_on=False)
        label = short(row.guard, 20 if wide else 12)
        axes.annotate(
            label,
            (edge, spot),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=WORD[word],
            weight="bold",
            annotation_clip=False,
        )
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.locator_params(axis="x", nbins=6 if wide else 4)
    axes.set_xlabel("Utility, relative to unguarded")
    axes.set_title("Fresh attack success rate", loc="left", x=-0.02, fontsize=11, color=MUTED)
    return True


_LINES = {"floor": "floor:", "ceiling": "ceiling:"}


def _dumbbell(figure: Any, rows: Sequence[GuardRow], width: int) -> bool:
    shown = [r for r in rows if r.asr_fresh is not None]
    if not any(r.asr_train is not None for r in shown):
        return False
    wide = width == WIDE
    height = 34 * len(shown) + 84
    axes = add_axes(figure, (width, height), (150 if wide else 96, 60 if wide else 48, 40, 40))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    for y, row in enumerate(shown):
        fresh, train = row.asr_fresh or 0.0, row.asr_train
        floor, colour = row.floor, WORD[verdict(row).word]
        if floor is not None:
            axes.plot([floor] * 2, [y - 0.32, y + 0.32], color=MUTED, linewidth=1.6)
        if train is not None:
            axes.plot([train, fresh], [y, y], color=colour, linewidth=3, alpha=0.45)
            axes.plot(train, y, "o", ms=9, mfc=PAPER, mec=colour, mew=2, clip_on=False)
        axes.plot(fresh, y, "o", ms=10, color=colour, mec=PAPER, mew=1, clip_on=False)
        label = f"{fresh:.1%}" if train is not None or not wide else f"{fresh:.1%} (fresh only)"
        axes.annotate(
            label,
            (max(fresh, train or 0.0), y),
            (10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    names = [short(r.guard, 20 if wide else 12) for r in shown]
    axes.set_yticks(range(len(shown)), names, color=INK)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    keys = [
        ("o", PAPER, "own attacker" if wide else "own"),
        ("o", INK, "fresh attacker" if wide else "fresh"),
        ("|", MUTED, "floor"),
    ]
    legend(figure, keys)
    return True


def _categories(figure: Any, rows: Sequence[GuardRow], width: int) -> bool:
    shown = [r for r in rows if r.asr_by_category]
    names = sorted({name for r in shown for name in r.asr_by_category})
    if not names:
        return False
    wide = width == WIDE
    columns = 2 if wide and len(shown) > 1 else 1
    lines = -(-len(shown) // columns)
    left, right, head, foot, gap = (110, 24, 26, 22, 10) if wide else (96, 22, 26, 22, 8)
    panel = 22 * len(names) + head + foot
    height = lines * panel + (lines - 1) * gap + 30
    figure.set_size_inches(width / 72, height / 72)
    for i, row in enumerate(shown):
        line, column = divmod(i, columns)
        x = column * width / columns + left
        y = height - 30 - line * (panel + gap) - panel + foot
        box = (x, y, width / columns - left - right, panel - head - foot)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        axes.tick_params(length=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        colour = WORD[verdict(row).word]
        for k, name in enumerate(names):
            _category(axes, k, row.asr_by_category.get(name, CategoryFigures()), colour)
        axes.set_yticks(range(len(names)), [short(n, 14) for n in names], color=INK)
        axes.set_xticks([0, 0.5, 1])
        percent_axis(axes.xaxis)
        title = short(row.guard, 26)
        axes.set_title(title, loc="left", color=colour, weight="bold", fontsize=12)
    legend(figure, [("o", INK, "fresh ASR"), ("|", MUTED, "floor"), ("D", PAPER, "ceiling")])
    return True


def _category(axes: Any, y: int, found: CategoryFigures, colour: str) -> None:
    asr, floor, ceiling = found.asr, found.floor, found.ceiling
    ci = found.bootstrap or found.wilson
    if floor is not None:
        axes.plot([floor] * 2, [y - 0.3, y + 0.3], color=MUTED, linewidth=1.6)
    if ceiling is not None:
        axes.plot(ceiling, y, "D", ms=6, mfc=PAPER, mec=INK, mew=1.1, clip_on=False)
    if asr is None:
        axes.text(0.02, y, "not measured", va="center", color=MUTED, fontsize=9)
        return
    if ci is not None:
        axes.plot(ci, [y, y], color=colour, linewidth=2.4, alpha=0.6, solid_capstyle="butt")
    axes.plot(asr, y, "o", ms=7.5, color=colour, mec=PAPER, mew=0.8, clip_on=False)
