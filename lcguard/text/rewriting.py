"""Puts placeholders where values were found, in the strings that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lcguard.text.json_text import escaped, json_tokens
from lcguard.text.placeholder import Placeholders
from lcguard.text.search import Hit, Leaf
from lcguard.text.walk import Spot
from lcguard.value_search import Range, merged

_DEEPEST = 8
"""JSON strings within each other that are read; what lies deeper is looked through as text."""


def leaves_of(text: str, host: int, spot: Spot) -> list[Leaf]:
    """What is read of one string: itself, or the strings and numbers of the JSON that it is."""
    return _expanded(Leaf(text, host, None, spot))


def _expanded(leaf: Leaf) -> list[Leaf]:
    if leaf.spot.is_number or leaf.depth >= _DEEPEST:
        return [leaf]
    tokens = json_tokens(leaf.text, leaf.spot.scalars)
    if tokens is None:
        return [leaf]
    out = []
    for token in tokens:
        form = token.form if leaf.form is None else token.form.over(leaf.form)
        spot = Spot(leaf.spot.group, None, token.is_number)
        out += _expanded(Leaf(token.form.text, leaf.host, form, spot, leaf.depth + 1))
    return out


@dataclass
class Rewriting:
    """What is hidden, and what stands in its place."""

    edits: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)
    """By host: characters, and their replacement."""
    originals: dict[str, str] = field(default_factory=dict)
    """Placeholder id to the value, as it stood where it was found first."""
    hidden: Counter[str] = field(default_factory=Counter)
    """How many values were hidden, by the word of their placeholder."""
    left: list[str] = field(default_factory=list)
    """What is left of each leaf between what was hidden."""

    def apply(self, text: str, host: int) -> str:
        """A host with its values replaced."""
        for start, end, made in sorted(self.edits.get(host, ()), reverse=True):
            text = text[:start] + made + text[end:]
        return text


def rewriting(leaves: Sequence[Leaf], hits: Sequence[Hit], placeholders: Placeholders) -> Rewriting:
    """Replaces every hit. A value in several pieces has its placeholder in the first of them."""
    out = Rewriting()
    by_leaf: dict[int, list[tuple[Range, Hit]]] = {}
    for hit in hits:
        for i, place in hit.pieces:
            by_leaf.setdefault(i, []).append((place, hit))
    kept = {
        i: [place for place, _ in placeholders.places(leaf.text)] for i, leaf in enumerate(leaves)
    }
    ranges = {i: _ranges(leaves[i], found, kept[i]) for i, found in by_leaf.items()}
    split = _split(hits, ranges)
    categories = {placeholders.id_of(hit.value): hit.category for hit in hits if hit.category}
    for i, leaf in enumerate(leaves):
        for place in ranges.get(i, ()):
            value, first = split.get((i, place)) or (_value(leaf, by_leaf[i], place), True)
            made = ""
            if first:
                name = placeholders.id_of(value)
                made = placeholders.of(value, categories.get(name, ""))
                out.originals.setdefault(name, value)
                out.hidden[made[1:].partition("-")[0]] += 1
            start, end = place if leaf.form is None else leaf.form.origin(*place)
            if leaf.spot.is_number and leaf.form is not None:
                quote = escaped('"', leaf.depth - 1)
                made = quote + made + quote
            out.edits.setdefault(leaf.host, []).append((start, end, made))
        out.left += _between(leaf.text, [*ranges.get(i, ()), *kept[i]])
    return out


def _ranges(leaf: Leaf, found: Sequence[tuple[Range, Hit]], kept: Sequence[Range]) -> list[Range]:
    """What is hidden of a leaf, none overlapping: named values and terms with their own bounds,
    then what is left of what patterns and detectors found around them."""
    firm = _without(merged(place for place, hit in found if hit.firm), kept)
    around = merged(place for place, hit in found if not hit.firm)
    soft = [
        part
        for place in around
        for part in _without([place], [*firm, *kept])
        if part == place or any(c.isalnum() for c in leaf.text[slice(*part)])
    ]
    return sorted([*firm, *soft])


def _split(
    hits: Sequence[Hit], ranges: dict[int, list[Range]]
) -> dict[tuple[int, Range], tuple[str, bool]]:
    """Pieces of values that are hidden as one: the value, and whether it is its first piece."""
    out: dict[tuple[int, Range], tuple[str, bool]] = {}
    for hit in sorted(hits, key=lambda h: (-len(h.pieces), not h.firm)):
        whole = all(place in ranges[i] for i, place in hit.pieces)
        if len(hit.pieces) > 1 and whole and not any(piece in out for piece in hit.pieces):
            for n, piece in enumerate(hit.pieces):
                out[piece] = (hit.value, n == 0)
    return out


def _value(leaf: Leaf, found: Sequence[tuple[Range, Hit]], place: Range) -> str:
    """What stands there; of a number its digits, however it is written."""
    return found[-1][1].value if leaf.spot.is_number else leaf.text[slice(*place)]


def _without(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    out = []
    for start, end in ranges:
        for low, high in sorted(holes):
            if low < end and start < high:
                if start < low:
                    out.append((start, low))
                start = max(start, high)
        if start < end:
            out.append((start, end))
    return out


def _between(text: str, holes: Sequence[Range]) -> list[str]:
    return [text[a:b] for a, b in _without([(0, len(text))], holes)]
