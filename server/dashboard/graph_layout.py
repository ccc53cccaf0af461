"""Layers for a small directed graph: who hands over to whom reads in one direction.

The steps of Sugiyama, Tagawa and Toda (1981) in their simplest form: edges that close a cycle are
turned round, a node's layer is its longest path from a start, an edge over several layers gets a
stop in each, and sweeps by barycentre order every layer. Equal input gives the same layout. By
hand, since networkx neither turns cycles round nor leads long edges past boxes, and Graphviz is a
program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Node = tuple[str, ...]
SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Nodes and stops of long edges, by layer and place."""

    layers: tuple[tuple[Node, ...], ...]
    """First to last; stops are in them too."""
    paths: tuple[tuple[Node, ...], ...]
    """Per edge, from its source to its target, one entry per layer on the way."""
    stops: frozenset[Node]
    """Entries of ``layers`` that are no agents."""


def arrange(edges: Sequence[tuple[Node, Node]]) -> Layout:
    """Lays out the nodes of ``edges``. Raises ``ValueError`` for an edge from a node to itself."""
    for source, target in edges:
        if source == target:
            raise ValueError(f"edge {source} -> {target} is a loop: leave it out")
    back = _closing_cycles(edges)
    forward = [(b, a) if i in back else (a, b) for i, (a, b) in enumerate(edges)]
    rank = _ranks(forward)
    layers: list[list[Node]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for node, layer in rank.items():
        layers[layer].append(node)
    paths, stops = [], set()
    for i, (a, b) in enumerate(forward):
        between: list[Node] = [("", "", str(i), str(k)) for k in range(rank[a] + 1, rank[b])]
        for k, stop in enumerate(between):
            layers[rank[a] + 1 + k].append(stop)
        stops.update(between)
        path = (a, *between, b)
        paths.append(path[::-1] if i in back else path)
    _order(layers, paths)
    return Layout(tuple(map(tuple, layers)), tuple(paths), frozenset(stops))


def _closing_cycles(edges: Sequence[tuple[Node, Node]]) -> set[int]:
    """Indices of edges that lead back to a node on the current depth-first path."""
    out: dict[Node, list[tuple[int, Node]]] = {}
    for i, (a, b) in enumerate(edges):
        out.setdefault(a, []).append((i, b))
        out.setdefault(b, [])
    targets = {b for _, b in edges}
    back: set[int] = set()
    done: set[Node] = set()
    on_path: set[Node] = set()

    def visit(node: Node) -> None:
        on_path.add(node)
        for i, after in out[node]:
            if after in on_path:
                back.add(i)
            elif after not in done:
                visit(after)
        on_path.remove(node)
        done.add(node)

    # starts first, so that an edge back to one of them is the edge that is turned
    for node in sorted(out, key=lambda n: n in targets):
        if node not in done:
            visit(node)
    return back


def _ranks(forward: Sequence[tuple[Node, Node]]) -> dict[Node, int]:
    rank = {node: 0 for edge in forward for node in edge}
    for _ in rank:  # a longest path has fewer edges than there are nodes
        for a, b in forward:
            rank[b] = max(rank[b], rank[a] + 1)
    return rank


def _order(layers: list[list[Node]], paths: Sequence[tuple[Node, ...]]) -> None:
    beside: dict[Node, list[Node]] = {}
    for path in paths:
        for a, b in pairwise(path):
            beside.setdefault(a, []).append(b)
            beside.setdefault(b, []).append(a)
    layer_of = {node: k for k, layer in enumerate(layers) for node in layer}
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        for k in range(len(layers))[::step]:
            # shares of the layer, because neighbours may lie in layers of another size
            spot = {n: (i + 0.5) / len(layer) for layer in layers for i, n in enumerate(layer)}
            centres = {}
            for node in layers[k]:
                seen = [spot[n] for n in beside[node] if (layer_of[n] - k) * step < 0]
                centres[node] = sum(seen) / len(seen) if seen else spot[node]
            layers[k].sort(key=centres.__getitem__)
