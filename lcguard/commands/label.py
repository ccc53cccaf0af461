"""``lcguard label``: texts to JSONL with the spans that detectors find in them, to be checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.commands.presidio import PresidioText
from lcguard.commands.text_detector import TextDetector

Found = tuple[int, int, str]
"""Characters ``[start, end)`` and category."""
PRESIDIO = "presidio"
_ENTITIES = {
    "PERSON": "person",
    "EMAIL_ADDRESS": "contact",
    "PHONE_NUMBER": "contact",
    "LOCATION": "contact",
    "IP_ADDRESS": "contact",
    "CREDIT_CARD": "account",
    "IBAN_CODE": "account",
    "US_BANK_NUMBER": "account",
    "CRYPTO": "account",
    "US_SSN": "government_id",
    "US_ITIN": "government_id",
    "US_PASSPORT": "government_id",
    "US_DRIVER_LICENSE": "government_id",
    "UK_NHS": "government_id",
    "MEDICAL_LICENSE": "government_id",
}
"""Presidio's entities that are categories of ours; dates, nationalities and links are none."""


def label(
    texts: Path, out: Path, detectors: Sequence[str], model: str, say: Callable[[str], None]
) -> Counter[str]:
    """Writes a record a text; how many values of each category were found.

    ``detectors``: ``presidio``, and guards with a detector (``smollm2:twin``, a folder). Where two
    overlap the first stays.

    Raises ``ValueError`` in one line for files that cannot be read or are there already, and for a
    detector that finds nothing itself.
    """
    lines = read_texts(texts)
    if out.exists():
        raise ValueError(f"{out} is there already: move it away, or give another --out")
    finders = [_finder(name, model) for name in detectors]
    counts, rows = Counter[str](), []
    for text in lines:
        spans = merged([found for finder in finders for found in finder(text)])
        counts.update(category for _, _, category in spans)
        rows.append(
            {
                "text": text,
                "spans": [
                    {"start": a, "end": b, "category": category, "value": text[a:b]}
                    for a, b, category in spans
                ],
                "questions": [],
            }
        )
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(out, data.encode(), mode=PUBLIC)
    total = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing"
    say(f"{out}: {len(rows)} texts, found {total}")
    say(
        "check every line: what a detector missed is not protected; and write questions that the "
        "receiver must still answer"
    )
    return counts


def read_texts(path: Path) -> list[str]:
    """A text a line, or of a ``.jsonl`` file each line's ``text``. Raises ``ValueError``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        out.append(_text_of(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip())
    if not out:
        raise ValueError(f"{path} has no text: write one a line")
    return out


def _text_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str) or not found["text"]:
        raise ValueError(f'{where}: write {{"text": "..."}}')
    return str(found["text"])


def merged(found: Sequence[Found]) -> list[Found]:
    """In order of the text, without those that overlap one that stands before them in ``found``."""
    kept: list[Found] = []
    for a, b, category in found:
        if a < b and all(b <= c or d <= a for c, d, _ in kept):
            kept.append((a, b, category))
    return sorted(kept)


def _finder(name: str, model: str) -> Callable[[str], list[Found]]:
    if name == PRESIDIO:
        engine = PresidioText()
        return lambda text: [
            (a, b, _ENTITIES[kind]) for a, b, kind in engine.entities(text) if kind in _ENTITIES
        ]
    detector = TextDetector(name.partition(":")[0] if ":" in name else model, name)
    return lambda text: [(s.start, s.end, s.category) for s in detector.find(text)]
