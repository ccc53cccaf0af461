"""Trains heads for categories of a policy's own, and saves them as their policy reads them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save

from lcguard.agents.scenarios.load import load_hops
from lcguard.agents.scenarios.own_examples import OwnExample, read_examples
from lcguard.atomic_file import replaced_folder
from lcguard.category_head import (
    CARD,
    WEIGHTS,
    CategoryHead,
    HeadCard,
    Measured,
    base_digest,
    examples_digest,
)
from lcguard.commands.text_detector import TextDetector, shared_text_detector
from lcguard.config import read_mapping
from lcguard.custom_categories import CustomCategory
from lcguard.evaluation.detection import LEVEL, overlapping, recall_lower
from lcguard.handoff.policy import parse_policy
from lcguard.training.fit_head import HeadConfig, HeadText, fit_and_measure
from lcguard.value_search import Range

Say = Callable[[str], None]
NEGATIVES = 60
"""Generated records without the category."""
MAX_TOKENS = 200_000
"""Of all texts together: what a head reads of them is held in memory."""
_UNCLEAR = "confidential"
"""The built-in category to which one of a user's own may belong as well: its values in generated
records say nothing of the own one."""


def train_policy(path: Path, names: Collection[str], config: HeadConfig, say: Say) -> list[Path]:
    """Trains a head for each category of a policy that has examples, or for those that are named.

    Raises ``ValueError`` in one line, for a policy or examples that cannot be used too.
    """
    policy = parse_policy(read_mapping(path), str(path), path.parent, untrained=True)
    common = {} if isinstance(policy.categories, tuple) else policy.categories
    given = [common, *(rules.categories for rules in policy.tenants.values())]
    found = [(n, c) for own in given for n, c in own.items() if c.examples is not None]
    if missing := {*names} - {n for n, _ in found}:
        raise ValueError(f"{path}: {min(missing)!r} is no category with examples: name one that is")
    if not found:
        raise ValueError(f"{path}: no category has examples: give one `examples: FILE.jsonl`")
    known = {n for own in given for n in own}
    return [
        train_category(name, _examples(category), _folder(category), config, say, known)
        for name, category in found
        if not names or name in names
    ]


def _examples(category: CustomCategory) -> Path:
    assert category.examples is not None
    return Path(category.examples)


def _folder(category: CustomCategory) -> Path:
    assert category.folder is not None
    return category.folder


def train_category(
    name: str,
    examples: Path,
    out: Path,
    config: HeadConfig,
    say: Say,
    known: Collection[str] = (),
) -> Path:
    """Trains one head and writes its folder, which it returns.

    Args:
        known: further categories that the examples may label.

    Raises ``ValueError`` in one line for a name, examples or a folder that cannot be used.
    """
    parse_policy({"version": 1, "categories": {name: {"terms": ["x"]}}, "edges": []}, "--name")
    digest = examples_digest(examples)
    read = read_examples(examples, name, known)
    if out.exists() and not _replaceable(out):
        raise ValueError(f"{out} is there and no head's folder: give another --out")
    n_values = sum(len(e.values) for e in read)
    say(f"{name}: {len(read)} texts with {n_values} values, from {examples.name}")
    with Progress(console=Console(stderr=True)) as bar:
        texts, swapped, negatives = _texts(shared_text_detector(), read, config, bar)
        task = bar.add_task("fit", total=config.steps * (config.folds + 1))
        made = fit_and_measure(texts, swapped, negatives, config, lambda: bar.advance(task))
    weights = save({k: v.contiguous() for k, v in made.head.state_dict().items()})
    card = HeadCard(
        category=name,
        base_sha256=base_digest(),
        examples_sha256=digest,
        n_examples=len(read),
        features=texts[0].features.shape[1],
        width=config.width,
        threshold=made.cut.threshold,
        peak=made.cut.peak,
        target_recall=config.target_recall,
        held_out=Measured(
            found=made.found,
            total=made.total,
            recall=made.found / made.total,
            recall_lower=recall_lower(made.found, made.total),
            level=LEVEL,
            examples_flagged=made.examples_flagged,
            negatives_flagged=made.negatives_flagged,
        ),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    save_head(CategoryHead(card, weights), out)
    say(_line(card))
    return out


def save_head(head: CategoryHead, folder: Path) -> None:
    """Writes the folder whole, or leaves what was there. Readable by its owner alone: the weights
    were fitted on what is to be hidden."""
    with replaced_folder(folder) as part:
        (part / WEIGHTS).write_bytes(head.weights)
        (part / CARD).write_text(head.card.model_dump_json(indent=1) + "\n")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir()))


def _line(card: HeadCard) -> str:
    held = card.held_out
    return (
        f"{card.category}: found {held.found} of {held.total} values that it had not seen "
        f"({held.recall:.3f}, at least {held.recall_lower:.3f} at {held.level:.0%}); flagged "
        f"{held.examples_flagged:.4f} of the examples' other tokens, {held.negatives_flagged:.4f} "
        "of generated records'"
    )


def _texts(
    detector: TextDetector, examples: Sequence[OwnExample], config: HeadConfig, bar: Progress
) -> tuple[list[HeadText], list[HeadText], list[HeadText]]:
    """Examples, examples with other values, and generated records."""
    hops = load_hops("generator", n=NEGATIVES, seed=config.seed)[:NEGATIVES]
    swaps = list(_swapped(examples, config))
    task = bar.add_task("read", total=len(examples) + len(swaps) + len(hops))
    groups: dict[str, int] = {}
    left = MAX_TOKENS
    out: tuple[list[HeadText], ...] = ([], [], [])

    def add(
        kind: int, e: OwnExample, also: Collection[str] = (), skip: Sequence[Range] = ()
    ) -> None:
        nonlocal left
        names = {*(name for _, name in e.named()), *also}
        # a text without values stands for itself
        own = frozenset(groups.setdefault(n, len(groups)) for n in names or {f"\0{e.text}"})
        to_find = set(e.values if kind == 0 else ())
        for x, offsets in detector.features(e.text):
            left -= len(offsets)
            if left < 0:
                raise ValueError(
                    f"the examples have more than {MAX_TOKENS} tokens, each read "
                    f"{config.swaps + 1} times: give fewer or shorter texts"
                )
            belongs = overlapping(offsets, [r for r, _ in e.named()])
            here = {v: r for v in to_find if (r := _tokens(offsets, *v)) is not None}
            to_find -= here.keys()  # pieces overlap
            counts = ~overlapping(offsets, skip)
            out[kind].append(
                HeadText(
                    x.to(torch.bfloat16),
                    tuple(sorted(here.values())),
                    belongs,
                    counts,
                    own if kind < 2 else frozenset(),
                )
            )
        bar.advance(task)

    for e in examples:
        add(0, e)
    for e, also in swaps:
        add(1, e, also)
    for hop in hops:
        unclear = [(s.start, s.end) for s in hop.record.spans if s.category == _UNCLEAR]
        add(2, OwnExample(hop.record.text, ()), skip=unclear)
    return out[0], out[1], out[2]


def _swapped(
    examples: Sequence[OwnExample], config: HeadConfig
) -> Iterator[tuple[OwnExample, set[str]]]:
    """Each text with values of others in the places of its own, and the names of its own: a head is
    to learn what stands around a value, and not the values."""
    rng = random.Random(f"swaps/{config.seed}")
    forms = [e.text[a:b] for e in examples for a, b in e.values]
    for e in examples if forms else ():
        for _ in range(config.swaps if e.values else 0):
            chosen: dict[str, str] = {}
            text, values, at = "", [], 0
            for (a, b), name in e.named():
                value = chosen.setdefault(name, rng.choice(forms))
                text += e.text[at:a]
                values.append((len(text), len(text) + len(value)))
                text, at = text + value, b
            yield OwnExample(text + e.text[at:], tuple(values)), {n for _, n in e.named()}


def _tokens(offsets: Sequence[Range], start: int, end: int) -> Range | None:
    """The tokens of a value; None where this piece has not all of it."""
    at = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not at or offsets[at[0]][0] > start or offsets[at[-1]][1] < end:
        return None
    return at[0], at[-1] + 1
