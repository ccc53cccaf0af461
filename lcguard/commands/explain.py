"""``lcguard explain``: a context with every token shaded by how much of it was withheld."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.text import Text

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.types import EdgeSpec, Hop, Record
from lcguard.categories import CATEGORIES
from lcguard.evaluation.explained import explain_tokens
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.nearest import unknown
from lcguard.records import masks
from lcguard.rule import Rule

_SHADES = ((0.75, "white on red"), (0.5, "black on orange1"), (0.2, "black on khaki1"))


def explain_text(
    text: str | None, guard: str, model: str, forbid: str, seed: int, plain: bool = False
) -> Text:
    """Shaded context with a legend.

    ``forbid``: ``all``, ``none``, or categories with commas between them. ``plain``: marks what is
    withheld by brackets with its share, for where colours are lost.

    Raises ``ValueError`` for an unknown category, guard or model.
    """
    names = categories_of(forbid)
    edge = EdgeSpec("sender", "receiver", Rule.of(names))
    backend = load_backend(model)
    if text is None:
        hop = hops_for(DataConfig(seed=seed, train_records=1, test_records=1))[1][0]
    else:
        record = Record("given", "text", "text", text, (), ())
        hop = Hop("given", edge, record)
    hop = Hop(hop.scenario_id, edge, hop.record)
    frozen = load_guard(GuardSpec("guard", path=guard), backend)
    (record_ids,) = backend.encoder.encode([hop])
    tokens = explain_tokens(
        frozen,
        record_ids,
        backend.source.prefill([record_ids.ids]),
        masks([record_ids]),
        backend.decode,
    )
    out = _bracketed(tokens) if plain else _shaded(tokens)
    kept = sum(1 - t["withheld"] for t in tokens) / len(tokens)
    out.append(f"\nforbidden: {', '.join(names) or 'nothing'}; {kept:.0%} of the entries pass\n")
    return out


def categories_of(text: str) -> tuple[str, ...]:
    """``all``, ``none``, or names with commas between them. Raises ``ValueError`` for others."""
    words = [word for part in text.split(",") if (word := part.strip())]
    if words == ["all"]:
        return CATEGORIES
    for word in words:
        if word not in CATEGORIES and words != ["none"]:
            raise ValueError(unknown("category", word, [*CATEGORIES, "all", "none"]))
    return () if words == ["none"] else tuple(words)


def _shade(share: float) -> str:
    return next((s for limit, s in _SHADES if share >= limit), "")


def _shaded(tokens: list[dict[str, Any]]) -> Text:
    out = Text()
    for token in tokens:
        out.append(token["text"], _shade(token["withheld"]))
    out.append("\n\nwithheld: ")
    for limit, style in reversed(_SHADES):
        out.append(f" {limit:.0%} and more ", style)
    return out


def _bracketed(tokens: list[dict[str, Any]]) -> Text:
    """Tokens of one shade behind each other as ``[their text|mean share]``."""
    out = Text()
    for style, group in groupby(tokens, lambda token: _shade(token["withheld"])):
        run = list(group)
        text = "".join(token["text"] for token in run)
        share = sum(token["withheld"] for token in run) / len(run)
        out.append(f"[{text}|{share:.0%}]" if style else text)
    out.append(f"\n\nwithheld: [text|share] where it is {_SHADES[-1][0]:.0%} and more")
    return out
