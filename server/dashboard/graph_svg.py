"""The live graph as SVG: agents as boxes, hops as arrows, a closed hop in words and in colour.

Drawn left to right for a desk and top down for a phone. A graph too large to read is not drawn:
its closed hops are, where those fit, and the table beside it lists every hop anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from lcguard.evaluation.svg import spread
from lcguard.evaluation.verdict import percent
from lcguard.handoff.names import ANY
from lcguard.server.dashboard.graph_layout import Layout, Node, arrange
from lcguard.server.dashboard.view import AgentRow, EdgeRow
from lcguard.server.dashboard.visible_text import visible

MAX_AGENTS, MAX_EDGES = 16, 24
BOX_PX, MARGIN_PX, CHAR_PX = 46, 12, 7.6


@dataclass(frozen=True)
class Shape:
    """A drawing's limits; along is the direction in which hops run, across the other."""

    name: str
    upright: bool
    """Hops run top down."""
    width_px: int
    max_layers: int
    max_across: int
    pitch_px: int
    """Between neighbours across (wide), between layers (upright)."""


WIDE = Shape("wide", False, 1160, 8, 8, 70)
NARROW = Shape("narrow", True, 350, 12, 3, 104)


@dataclass(frozen=True)
class Graph:
    """The drawings of one view."""

    wide: Markup | None
    narrow: Markup | None
    too_large: bool
    """The whole graph could not be drawn: what is drawn are its closed hops, if anything."""


def graph(edges: Sequence[EdgeRow], agents: Sequence[AgentRow]) -> Graph:
    """Draws all hops, or the closed ones where all are too many, or nothing."""
    shown = [e for e in edges if e.source != e.audience]
    closed = [e for e in shown if e.state == "closed"]
    for some in (shown, closed):
        wide = _draw(some, agents, WIDE)
        if wide is not None:
            return Graph(wide, _draw(some, agents, NARROW), len(some) < len(shown))
    return Graph(None, None, bool(shown))


def _draw(edges: Sequence[EdgeRow], agents: Sequence[AgentRow], shape: Shape) -> Markup | None:
    ends: list[tuple[Node, Node]] = [((e.tenant, e.source), (e.tenant, e.audience)) for e in edges]
    if not edges or len(edges) > MAX_EDGES or len({n for e in ends for n in e}) > MAX_AGENTS:
        return None
    layout = arrange(ends)
    across = max(len(layer) for layer in layout.layers)
    if len(layout.layers) > shape.max_layers or across > shape.max_across:
        return None
    return _Drawing(edges, agents, layout, shape).svg()


class _Drawing:
    def __init__(
        self, edges: Sequence[EdgeRow], agents: Sequence[AgentRow], layout: Layout, shape: Shape
    ) -> None:
        self.edges, self.layout, self.shape = edges, layout, shape
        self.in_flight = {(a.tenant, a.name): a.in_flight for a in agents}
        self.tenants = len({e.tenant for e in edges}) > 1
        n_layers, across = len(layout.layers), max(map(len, layout.layers))
        if shape.upright:
            self.along_px = n_layers * shape.pitch_px - (shape.pitch_px - BOX_PX) + 2 * MARGIN_PX
            self.across_px = shape.width_px
            self.box_px = min(150.0, shape.width_px / across - 10)
            self.deep_px = float(BOX_PX)
        else:
            self.along_px = shape.width_px
            self.across_px = across * shape.pitch_px + 2 * MARGIN_PX
            self.box_px = self.deep_px = min(200.0, 0.62 * shape.width_px / n_layers)
        self.centre = {
            node: (self._along(k), self._across(i, len(layer)))
            for k, layer in enumerate(layout.layers)
            for i, node in enumerate(layer)
        }
        self.ports = self._ports()

    def _along(self, layer: int) -> float:
        n = len(self.layout.layers)
        first = MARGIN_PX + self.deep_px / 2
        if n == 1:
            return first
        return first + layer * (self.along_px - 2 * first) / (n - 1)

    def _across(self, place: int, n: int) -> float:
        return self.across_px * (place + 0.5) / n

    def _ports(self) -> dict[tuple[int, int, bool], float]:
        """Where (edge, step) leaves (True) and enters (False), spread along the side of a box."""
        sides: dict[tuple[Node, bool], list[tuple[float, int, tuple[int, int, bool]]]] = {}
        for i, path in enumerate(self.layout.paths):
            for k, (a, b) in enumerate(pairwise(path)):
                ahead = self.centre[b][0] > self.centre[a][0]
                sides.setdefault((a, ahead), []).append((self.centre[b][1], i, (i, k, True)))
                sides.setdefault((b, not ahead), []).append((self.centre[a][1], i, (i, k, False)))
        ports = {}
        for (node, _), found in sides.items():
            across = self.box_px if self.shape.upright else BOX_PX
            step = min(16.0, (across - 12) / len(found))
            for j, (_, _, key) in enumerate(sorted(found)):
                ports[key] = self.centre[node][1] + (j - (len(found) - 1) / 2) * step
        return ports

    def _xy(self, along: float, across: float) -> str:
        x, y = (across, along) if self.shape.upright else (along, across)
        return f"{x:.1f},{y:.1f}"

    def svg(self) -> Markup:
        width, height = self.along_px, self.across_px
        if self.shape.upright:
            width, height = height, width
        ident = f"graph-{self.shape.name}"
        n_agents = sum(len(layer) for layer in self.layout.layers) - len(self.layout.stops)
        lines = Markup("").join(self._line(i) for i in range(len(self.edges)))
        boxes = Markup("").join(self._box(n) for n in self.centre if n not in self.layout.stops)
        return Markup(
            '<svg class="graph" role="img" viewBox="0 0 {w:.0f} {h:.0f}" '
            'aria-labelledby="{i}-t {i}-d"><title id="{i}-t">Agents and hops</title>'
            '<desc id="{i}-d">{desc}</desc>{lines}{boxes}{labels}</svg>'
        ).format(
            w=width,
            h=height,
            i=ident,
            desc=self._describe(n_agents),
            lines=lines,
            boxes=boxes,
            labels=self._labels(),
        )

    def _describe(self, n_agents: int) -> str:
        hops = "; ".join(
            f"{_name(e.source)} to {_name(e.audience)}: {e.state}, "
            + ("not measured yet" if e.asr is None else f"ASR {percent(e.asr)}")
            for e in self.edges
        )
        return f"{n_agents} agents, {len(self.edges)} hops. {hops}."

    def _line(self, index: int) -> Markup:
        edge, path = self.edges[index], self.layout.paths[index]
        parts, tip = [], ""
        for k, (a, b) in enumerate(pairwise(path)):
            (at, _), (to, _) = self.centre[a], self.centre[b]
            ahead = 1 if to > at else -1
            reach = ahead * self.deep_px / 2
            last = k == len(path) - 2
            start, end = at + reach, to - reach - (9 * ahead if last else 0)
            y1, y2 = self.ports[index, k, True], self.ports[index, k, False]
            middle = (start + end) / 2
            parts.append(f"{'L' if k else 'M'}{self._xy(start, y1)}")
            parts.append(f"C{self._xy(middle, y1)} {self._xy(middle, y2)} {self._xy(end, y2)}")
            if last:
                tip = " ".join(
                    (self._xy(end + 9 * ahead, y2), self._xy(end, y2 - 5), self._xy(end, y2 + 5))
                )
        kind = "closed" if edge.state == "closed" else "open" if edge.asr is not None else "unknown"
        return Markup(
            '<g class="hop {kind}"><title>{title}</title><path d="{path}"/>'
            '<polygon points="{tip}"/></g>'
        ).format(
            kind=kind,
            path=" ".join(parts),
            tip=tip,
            title=f"{_name(edge.source)} → {_name(edge.audience)}: {edge.state}",
        )

    def _labels(self) -> Markup:
        """A word or a figure on each line, kept apart from the others of the same gap."""
        gaps: dict[float, list[tuple[int, float]]] = {}
        for i, path in enumerate(self.layout.paths):
            edge = self.edges[i]
            if edge.state != "closed" and (edge.asr is None or self.shape.upright):
                continue  # on a phone only the alarm has room
            k = (len(path) - 1) // 2 if len(path) > 2 else 0
            along = (self.centre[path[k]][0] + self.centre[path[k + 1]][0]) / 2
            across = (self.ports[i, k, True] + self.ports[i, k, False]) / 2
            gaps.setdefault(along, []).append((i, across))
        out = Markup("")
        size = 78 if self.shape.upright else 18
        for along, found in gaps.items():
            places = spread([y for _, y in found], size, size / 2, self.across_px - size / 2)
            for (i, _), across in zip(found, places, strict=True):
                x, y = (across, along) if self.shape.upright else (along, across)
                edge = self.edges[i]
                closed = edge.state == "closed"
                text = "✕ CLOSED" if closed else percent(edge.asr)
                wide = len(text) * (9.4 if closed else 7.6) + 6
                out += Markup(
                    '<g class="tag{c}"><rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" '
                    'height="17" rx="4"/><text x="{x:.1f}" y="{y:.1f}">{t}</text></g>'
                ).format(
                    c=" closed" if closed else "",
                    left=x - wide / 2,
                    top=y - 8.5,
                    w=wide,
                    x=x,
                    y=y + 4,
                    t=text,
                )
        return out

    def _box(self, node: Node) -> Markup:
        along, across = self.centre[node]
        x, y = (across, along) if self.shape.upright else (along, across)
        limit = int((self.box_px - 16) / CHAR_PX)
        tenant, name = node
        n = self.in_flight.get((tenant, name), 0)
        below = " · ".join(
            [visible(tenant)] * self.tenants + [f"{n} in flight" if n else "idle"] * (name != ANY)
        )
        return Markup(
            '<g class="agent{busy}"><title>{full}</title>'
            '<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h}" rx="9"/>'
            '<text class="name" x="{x:.1f}" y="{y1:.1f}">{name}</text>'
            '<text class="sub" x="{x:.1f}" y="{y2:.1f}">{below}</text></g>'
        ).format(
            busy=" busy" if n else "",
            full=_name(name),
            left=x - self.box_px / 2,
            top=y - BOX_PX / 2,
            w=self.box_px,
            h=BOX_PX,
            x=x,
            y1=y - 2 if below else y + 5,
            y2=y + 14,
            name=_fit(_name(name), limit),
            below=_fit(below, int(limit * 1.15)),
        )


def _name(agent: str) -> str:
    return "any agent" if agent == ANY else visible(agent)


def _fit(text: str, limit: int) -> str:
    """Start and end of a long text, since names tend to differ in one of them."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"
