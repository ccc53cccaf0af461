"""One screening as a bar, several as a line, on a scale that all edges of a page share."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lcguard.evaluation.verdict import percent
from lcguard.server.dashboard.view import EdgeRow

BAR_PX, BAR_HIGH_PX = 190, 22
LINE_PX, LINE_HIGH_PX = 90, 36
PAD_PX = 5
TOPS = (0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0)


def scale_top(edges: Sequence[EdgeRow], threshold: float) -> float:
    """The ASR at the right end of every bar: the smallest round one that shows all figures."""
    figures = [
        figure
        for e in edges
        for figure in (e.asr, e.asr_high, e.floor, *e.history)
        if figure is not None
    ]
    need = max([*figures, threshold * 1.25])
    return next((top for top in TOPS if top >= need), 1.0)


def leak_bar(edge: EdgeRow, threshold: float, top: float) -> Markup:
    """Interval as a band, ASR as a dot, floor as a thin tick, threshold as a full line."""
    if edge.asr is None:
        return Markup("")

    def x(share: float) -> float:
        return PAD_PX + min(max(share / top, 0.0), 1.0) * (BAR_PX - 2 * PAD_PX)

    low = edge.asr if edge.asr_low is None else edge.asr_low
    high = edge.asr if edge.asr_high is None else edge.asr_high
    label = f"ASR {percent(edge.asr)}, interval {percent(low)} to {percent(high)}, "
    label += f"floor {percent(edge.floor)}, threshold {percent(threshold)}"
    middle = BAR_HIGH_PX / 2
    tick = Markup("")
    if edge.floor is not None:
        tick = Markup('<path class="floor" d="M{x:.1f},{a:.1f}V{b:.1f}"/>').format(
            x=x(edge.floor), a=middle - 5, b=middle + 5
        )
    return Markup(
        '<svg class="bar {kind}" role="img" width="{w}" height="{h}" viewBox="0 0 {w} {h}">'
        '<title>{label}</title><path class="rail" d="M{l},{m}H{r}"/>'
        '<rect class="ci" x="{lo:.1f}" y="{t}" width="{cw:.1f}" height="8" rx="2"/>{tick}'
        '<path class="limit" d="M{th:.1f},1V{b}"/><circle cx="{dot:.1f}" cy="{m}" r="4.5"/></svg>'
    ).format(
        kind="above" if edge.asr > threshold else "below",
        w=BAR_PX,
        h=BAR_HIGH_PX,
        label=label,
        l=PAD_PX,
        r=BAR_PX - PAD_PX,
        m=middle,
        lo=x(low),
        t=middle - 4,
        cw=max(x(high) - x(low), 1.0),
        tick=tick,
        th=x(threshold),
        b=BAR_HIGH_PX - 1,
        dot=x(edge.asr),
    )


def history_line(edge: EdgeRow, threshold: float, top: float) -> Markup:
    """The ASR of the last screenings, oldest left; nothing for fewer than two."""
    n = len(edge.history)
    if n < 2:
        return Markup("")

    def y(share: float) -> float:
        return LINE_HIGH_PX - 4 - min(max(share / top, 0.0), 1.0) * (LINE_HIGH_PX - 8)

    step = (LINE_PX - 2 * PAD_PX) / (n - 1)
    points = [(PAD_PX + i * step, y(share)) for i, share in enumerate(edge.history)]
    return Markup(
        '<svg class="history {kind}" role="img" width="{w}" height="{h}" viewBox="0 0 {w} {h}">'
        "<title>{label}</title>"
        '<path class="limit" d="M{l},{t:.1f}H{r}"/><polyline points="{points}"/>'
        '<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></svg>'
    ).format(
        kind="above" if edge.history[-1] > threshold else "below",
        w=LINE_PX,
        h=LINE_HIGH_PX,
        label=f"ASR of the last {n} screenings, oldest first: "
        + ", ".join(percent(share) for share in edge.history),
        l=PAD_PX,
        r=LINE_PX - PAD_PX,
        t=y(threshold),
        points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points),
        x=points[-1][0],
        y=points[-1][1],
    )
