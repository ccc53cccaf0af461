"""Server-sent events: whole events out of pieces, without holding any back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

DONE = b"data: [DONE]\n\n"
_LONGEST = 16 * 2**20


class Events:
    """Cuts a byte stream into events. A piece that holds three events gives three."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The events that are whole now, each with its empty line.

        Raises ``ValueError`` for an event that never ends.
        """
        data = self._rest + piece
        start = 0
        while (end := data.find(b"\n\n", start)) >= 0:
            yield data[start : end + 2]
            start = end + 2
        self._rest = data[start:]
        if len(self._rest) > _LONGEST:
            raise ValueError(f"an event of more than {_LONGEST} bytes")

    @property
    def rest(self) -> bytes:
        """An event that the end of the stream cut off."""
        return self._rest


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """One event of the Responses API: its type is its name too."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


def named_data_of(raw: bytes) -> Any:
    """``data_of`` an event with a name."""
    return data_of(raw[max(0, raw.find(b"data: ")) :])


def data_of(raw: bytes) -> Any:
    """The JSON data of an event; None where it has none (a comment, ``[DONE]``)."""
    if not raw.startswith(b"data: {"):
        return None
    try:
        return json.loads(raw[6:])
    except ValueError:
        return None
