"""``lcguard explain``: a context with every token shaded by how much of it was withheld."""

from __future__ import annotations

from rich.text import Text

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.types import EdgeSpec, Hop, Record
from lcguard.categories import CATEGORIES
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.evaluation.summary import explain_tokens
from lcguard.records import masks
from lcguard.rule import Rule

_SHADES = ((0.75, "white on red"), (0.5, "black on orange1"), (0.2, "black on khaki1"))


def explain_text(text: str | None, guard: str, model: str, forbid: str, seed: int) -> Text:
    """Shaded context with a legend.

    Raises ``ValueError`` for an unknown category, guard or model.
    """
    names = tuple(c.strip() for c in forbid.split(",") if c.strip()) or CATEGORIES
    for name in names:
        if name not in CATEGORIES:
            raise ValueError(f"category {name!r} is unknown; known: {', '.join(CATEGORIES)}")
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
    out = Text()
    for token in tokens:
        share = token["withheld"]
        style = next((s for limit, s in _SHADES if share >= limit), "")
        out.append(token["text"], style)
    out.append("\n\nwithheld: ")
    for limit, style in reversed(_SHADES):
        out.append(f" {limit:.0%} and more ", style)
    kept = sum(1 - t["withheld"] for t in tokens) / len(tokens)
    out.append(f"\nforbidden: {', '.join(names)}; {kept:.0%} of the entries pass\n")
    return out
