"""The values behind placeholders, for callers whom an edge's ``restore`` names.

Each is encrypted with AES-256-GCM under a key derived from the deployment key, bound to its place
(tenant, conversation, id and edge), so that no row can be read without the key or be moved to
another's. It is gone with the edge's ``ttl_s``, counted from when it was hidden last.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lcguard.canonical import canonical_hmac, canonical_json, check_key
from lcguard.server.database.connection import Connection

_NONCE_BYTES = 12


@dataclass(frozen=True)
class Kept:
    """A value, and the edge on which it was hidden."""

    name: str
    """Of its placeholder."""
    source: str
    audience: str
    value: str


class Vault:
    """Reads and writes the table ``originals``, within a caller's transaction."""

    def __init__(self, key: bytes) -> None:
        """``key``: the deployment key. Raises ``ValueError`` where it is too short."""
        self._key = check_key(key)
        self._cipher = AESGCM(hmac.digest(self._key, b"lcguard text vault\0", "sha256"))

    def keep(
        self,
        connection: Connection,
        tenant: str,
        conversation: str,
        source: str,
        audience: str,
        originals: Mapping[str, str],
        until_s: float,
    ) -> None:
        """Keeps the values of an edge, each in place of what was there."""
        talk = self._talk(tenant, conversation)
        for name, value in originals.items():
            place = [tenant, talk, name, source, audience]
            nonce = os.urandom(_NONCE_BYTES)
            sealed = nonce + self._cipher.encrypt(
                nonce, value.encode("utf-8", "surrogatepass"), canonical_json(place)
            )
            connection.execute(
                "INSERT INTO originals VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (tenant, conversation, name, source, audience) "
                "DO UPDATE SET expires_at_s = EXCLUDED.expires_at_s, sealed = EXCLUDED.sealed",
                (*place, until_s, sealed),
            )

    def find(
        self,
        connection: Connection,
        tenant: str,
        conversation: str,
        names: Collection[str],
        now_s: float,
    ) -> list[Kept]:
        """What is kept under some ids; rows that were altered are not there."""
        talk, out = self._talk(tenant, conversation), []
        for name in names:
            rows = connection.execute(
                "SELECT source, audience, sealed FROM originals "
                "WHERE tenant = ? AND conversation = ? AND name = ? AND expires_at_s > ?",
                (tenant, talk, name, now_s),
            )
            for source, audience, sealed in rows:
                place = [tenant, talk, name, source, audience]
                try:
                    opened = self._cipher.decrypt(
                        sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], canonical_json(place)
                    )
                except (InvalidTag, ValueError):
                    continue
                value = opened.decode("utf-8", "surrogatepass")
                out.append(Kept(name, source, audience, value))
        return out

    def _talk(self, tenant: str, conversation: str) -> str:
        """A conversation's name may say something; what is stored does not."""
        return canonical_hmac(self._key, b"lcguard text conversation\0", [tenant, conversation])


def sweep_originals(connection: Connection, now_s: float) -> int:
    """Deletes what has expired; returns how many values that were."""
    done = connection.execute("DELETE FROM originals WHERE expires_at_s <= ?", (now_s,))
    return done.rowcount
