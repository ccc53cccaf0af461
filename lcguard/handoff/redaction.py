"""What guard ``redact`` covers in a prompt: the tokens of every value, and the proof that none is
left in the others.

What a publisher names is looked for in every spelling, and so are the terms of a policy's own
categories. What a detector or a pattern finds is treated the same way: a number that it knew in one
place is covered in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcguard.custom_categories import CustomCategory, SearchError, find_custom, find_learned
from lcguard.detokenize import TokenText
from lcguard.normalise import runs
from lcguard.value_search import SHORTEST, Key, Range, Spellings, merged


class RedactionError(Exception):
    """A prompt that cannot be redacted as wanted; one line that shows nothing of it."""


@dataclass(frozen=True)
class Redaction:
    """What is covered."""

    spans: list[list[int]]
    """Token ranges ``[start, end)``, in order, none touching the next."""
    n_occurrences: int
    """Places of the text that they cover."""


def redact(
    prompt: TokenText,
    ids: Sequence[int],
    tokenizer: Any,
    secrets: Sequence[str],
    detect: Callable[[str], Iterable[Range]] = lambda _: (),
    custom: Mapping[str, CustomCategory] | None = None,
) -> Redaction:
    """Covers every occurrence of ``secrets``, of what ``detect`` finds in the prompt and of what
    belongs to a category of ``custom``.

    Raises:
        RedactionError: for a secret that is nowhere in the prompt or of white space alone, for a
            pattern that takes too long or a head that cannot read, and where a covered value could
            still be read from the tokens that are left.
    """
    text = Spellings(prompt.text)
    keys: list[Key] = []
    places: list[Range] = []
    for i, secret in enumerate(secrets):
        try:
            key = Key.of(secret)
        except ValueError as error:
            raise RedactionError(f"secrets[{i}] is {error}: name a text") from None
        found = text.find(key)
        if not found:
            raise RedactionError(
                f"secrets[{i}], a text of {len(secret)} characters, is not in the prompt in any "
                "spelling: name it as it stands there, or leave it out"
            )
        keys.append(key)
        places += found
    detected = list(detect(prompt.text))
    custom = custom or {}
    try:
        for found_of in (find_custom(text, custom), find_learned(prompt.text, custom)):
            detected += [place for found in found_of.values() for place in found]
    except SearchError as error:
        raise RedactionError(str(error)) from None
    values = {Key.of(prompt.text[a:b]) for a, b in detected}
    known = [key for key in values if len(key.bare) >= SHORTEST]
    places = merged([*places, *detected, *text.find(*known)])
    keys += [*known, *(key for category in custom.values() for key in category.keys)]
    spans = prompt.tokens(places)
    _check_twin(ids, spans, tokenizer, keys)
    return Redaction(spans, len(places))


def covered(ids: Sequence[int], spans: Sequence[tuple[int, int]], neutral_id: int) -> list[int]:
    """Tokens with the neutral one in place of each within ``spans``."""
    out = list(ids)
    for start, end in spans:
        out[start:end] = [neutral_id] * (end - start)
    return out


def _check_twin(
    ids: Sequence[int], spans: Sequence[Sequence[int]], tokenizer: Any, keys: Iterable[Key]
) -> None:
    """The tokens that are left, as the tokenizer itself decodes them, hold no covered value."""
    ends = [0, *(end for span in spans for end in span), len(ids)]
    kept = [list(ids[a:b]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    left = (Spellings(tokenizer.decode(run, skip_special_tokens=True)) for run in kept if run)
    forms = "\0".join(form for run in left for form in run.forms())  # no form has a NUL
    wanted = {form for key in keys for form in (key.bare, key.signs)}
    if next(runs(forms, wanted), None) is not None:
        raise RedactionError(
            "a value that was to be covered can still be read from the tokens around it"
        )
