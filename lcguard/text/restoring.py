"""Puts values back in their placeholders' place, wherever these stand in a JSON value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lcguard.text.json_text import escaped
from lcguard.text.placeholder import Placeholders
from lcguard.text.rewriting import Rewriting, leaves_of
from lcguard.text.search import Leaf
from lcguard.text.walk import Spot, Walk


def names_in(value: Any, placeholders: Placeholders) -> set[str]:
    """The ids of all placeholders in a value. Raises ``HandoffError`` (400) for what is no JSON."""
    leaves, _ = _read(value)
    return {name for leaf in leaves for _, name in placeholders.places(leaf.text)}


def restored(
    value: Any, originals: Mapping[str, str], placeholders: Placeholders
) -> tuple[Any, int]:
    """A value with what is known of its placeholders put back, and how many were.

    A value that stood as a JSON number comes back as a string. Raises as ``names_in``.

    Args:
        originals: placeholder id to value (``Guarded.originals``).
    """
    leaves, hosts = _read(value)
    found, n = Rewriting(), 0
    for leaf in leaves:
        for place, name in placeholders.places(leaf.text):
            if name in originals:
                start, end = place if leaf.form is None else leaf.form.origin(*place)
                made = escaped(originals[name], leaf.depth)
                found.edits.setdefault(leaf.host, []).append((start, end, made))
                n += 1
    made_again: Iterator[str] = iter([found.apply(text, i) for i, text in enumerate(hosts)])
    return Walk(lambda text, spot: next(made_again)).json(value), n


def _read(value: Any) -> tuple[list[Leaf], list[str]]:
    hosts: list[str] = []
    leaves: list[Leaf] = []

    def collect(text: str, spot: Spot) -> str:
        leaves.extend(leaves_of(text, len(hosts), spot))
        hosts.append(text)
        return text

    Walk(collect).json(value)
    return leaves, hosts
