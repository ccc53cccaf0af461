"""The text that a prompt's tokens stand for, with the way back from characters to tokens.

Decoding token by token would lose the spaces of Metaspace tokenizers and characters that several
tokens make together, so tokens are turned into bytes as the tokenizer's own decoder does it, and
the whole is held against what that decoder makes of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from lcguard.normalise import skeleton
from lcguard.value_search import Range

_ESCAPED = re.compile("[\ud800-\udfff]")


class TokenTextError(Exception):
    """Tokens whose text is not known; one line with the reason."""


@dataclass(frozen=True)
class TokenText:
    """A text made of tokens."""

    text: str
    ranges: tuple[Range, ...]
    """Of each token, the characters that it has a part in. Special tokens have none: in the text
    each is a line's end."""

    def tokens(self, places: Sequence[Range]) -> list[list[int]]:
        """Ranges ``[start, end)`` of the tokens that have a part in any of ``places``, which are
        in order and do not overlap."""
        out: list[list[int]] = []
        at = 0
        for i, (start, end) in enumerate(self.ranges):
            while at < len(places) and places[at][1] <= start:
                at += 1
            if at == len(places) or start >= end or places[at][0] >= end:
                continue
            if out and out[-1][1] == i:
                out[-1][1] = i + 1
            else:
                out.append([i, i + 1])
        return out


class TokenTexts:
    """Texts of one tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: a fast one of ``transformers``. Raises ``TokenTextError`` for another, and
        for a decoder that is not known here."""
        if not getattr(tokenizer, "is_fast", False):
            raise TokenTextError("it is none of the package tokenizers")
        self.tokenizer = tokenizer
        self._added = {int(i): t for i, t in tokenizer.added_tokens_decoder.items()}
        self._description = json.loads(tokenizer.backend_tokenizer.to_str())
        self._bytes = _byte_maker(self._description["decoder"])

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for any character which the vocabulary lacks; None where every
        byte has a token."""
        model = self._description["model"]
        if model.get("byte_fallback") or "ByteLevel" in json.dumps(self._description["decoder"]):
            return None
        if (name := model.get("unk_token")) is not None:
            found = self.tokenizer.convert_tokens_to_ids(name)
            return None if found is None else int(found)
        found = model.get("unk_id")
        return None if found is None else int(found)

    def of(self, ids: Sequence[int]) -> TokenText:
        """The text of a prompt. Raises ``TokenTextError`` where the tokens do not tell it."""
        if self._unknown is not None and self._unknown in ids:
            raise TokenTextError(
                "the prompt has characters that the model's tokenizer does not know, so nobody "
                "can tell what they hide: leave them out"
            )
        pieces = self._pieces(ids)
        special = [(a := self._added.get(i)) is not None and bool(a.special) for i in ids]
        # one character for each byte that makes none, so that every character's bytes count
        text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
        char_at = _char_at(text)
        ends = list(accumulate(map(len, pieces), initial=0))
        # a character belongs to every token that has a byte of it
        ranges = tuple(
            (char_at[a], char_at[a] if a == b or s else char_at[b - 1] + 1)
            for (a, b), s in zip(pairwise(ends), special, strict=True)
        )
        text = _ESCAPED.sub("\ufffd", text)
        own = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        if skeleton(own).text != skeleton(text).text:
            raise TokenTextError("the tokenizer reads these tokens otherwise than one by one")
        return TokenText(text, ranges)

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; a line's end for a special one."""
        try:
            tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        except (OverflowError, TypeError):
            tokens = [None]
        if None in tokens:
            raise TokenTextError("the prompt holds a number that is no token of the model's")
        made = {
            i: self._bytes(token)
            if (added := self._added.get(i)) is None
            else b"\n"
            if added.special
            else str(added.content).encode()
            for i, token in zip(ids, tokens, strict=True)
        }
        return [made[i] for i in ids]


def _char_at(text: str) -> Sequence[int]:
    """For each byte of the text, and one beyond, the character that it belongs to."""
    if text.isascii():
        return range(len(text) + 1)
    out: list[int] = []
    for i, c in enumerate(text):
        out += [i] * len(c.encode("utf-8", errors="surrogateescape"))
    out.append(len(text))
    return out


def _byte_maker(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """What a tokenizer's decoder makes of one token, spaces at the text's ends aside."""
    if decoder is None:
        raise TokenTextError("it has no decoder")
    parts = decoder.get("decoders", [decoder])
    steps, names = [_step(d) for d in parts], {d["type"] for d in parts}
    table = _byte_table()

    def make(token: str) -> bytes:
        if "ByteFallback" in names and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            return bytes([int(token[3:5], 16)])
        for step in steps:
            token = step(token)
        if "ByteLevel" in names:
            return b"".join(
                bytes([table[c]]) if c in table else c.encode("utf-8", "surrogatepass")
                for c in token
            )
        return token.encode("utf-8", "surrogatepass")

    return make


def _step(d: dict[str, Any]) -> Callable[[str], str]:
    """One step of a decoder on one token. Raises ``TokenTextError`` for one not known here."""
    match d["type"]:
        case "ByteLevel" | "ByteFallback" | "Fuse" | "Strip":
            return lambda token: token
        case "Metaspace":
            return lambda token: token.replace(d["replacement"], " ")
        case "Replace" if "String" in d["pattern"]:
            return lambda token: token.replace(d["pattern"]["String"], d["content"])
    raise TokenTextError(f"its decoder {d['type']!r} is not known here")


def _byte_table() -> dict[str, int]:
    """The printable character that stands for each byte in the vocabulary of byte-level BPE."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}
