"""Characters as JSON, HTML and URLs write them: ``\\u00fc``, ``&#252;``, ``%C3%BC``.

Tool calls and their results stand in prompts as JSON or HTML, and a model reads them as a person
does. Whether a text was meant so nobody can tell, so it is looked through as it stands as well.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_to_bytes

from lcguard.normalise import Form

# A backslash may itself have been escaped, any number of times.
_ESCAPE = re.compile(
    r"(?P<json>(?:\\+u[0-9a-fA-F]{4})+)"
    r"|\\+x(?P<hex>[0-9a-fA-F]{2})"
    r"|(?P<space>\\+[nrtfv])"
    r"|(?P<html>&(?:amp;)*(?:\#[0-9]{1,7}|\#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});)"
    r"|(?P<url>(?:%[0-9a-fA-F]{2})+)"
    r"|(?P<tag></?[A-Za-z][^<>]{0,200}>)"
)
_HEX = re.compile("[0-9a-fA-F]{4}")


def unescaped(text: str) -> Form | None:
    """The text with every escape read and every tag left out; None where it has neither."""
    parts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    for match in _ESCAPE.finditer(text):
        start, end = match.span()
        read = _read(match)
        parts += text[at:start], read
        starts += [*range(at, start), *[start] * len(read)]
        ends += [*range(at + 1, start + 1), *[end] * len(read)]
        at = end
    if not at:
        return None
    parts.append(text[at:])
    starts += range(at, len(text))
    ends += range(at + 1, len(text) + 1)
    return Form("".join(parts), tuple(starts), tuple(ends))


def _read(match: re.Match[str]) -> str:
    found = match.group()
    match match.lastgroup:
        case "json":
            units = b"".join(int(u, 16).to_bytes(2, "big") for u in _HEX.findall(found))
            return units.decode("utf-16-be", errors="replace")
        case "hex":
            return chr(int(match["hex"], 16))
        case "space":
            return " "
        case "html":
            return html.unescape(found.replace("amp;", "")) if found != "&amp;" else "&"
        case "url":
            return unquote_to_bytes(found).decode(errors="replace")
    return " "
