"""What agents and tenants may be called: one rule for policy, engine and API keys.

A policy that names what no agent can be called protects nothing, so every name that a policy
takes is one that the engine takes too. The proxy's keys carry fewer.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import StringConstraints

ANY = "*"
_PART = r"[\x21-\x29\x2b-\x2e\x30-\x7e]"  # visible ASCII without `*` and `/`

PolicyName = Annotated[str, StringConstraints(pattern=rf"^(\*|{_PART}{{1,100}})$")]
"""Of an agent or a tenant in a policy; a pattern such as ``agent-*`` would match nobody."""
_QUALIFIED = rf"({_PART}+/)?{_PART}+"
QualifiedName = Annotated[str, StringConstraints(pattern=rf"^{_QUALIFIED}$", max_length=100)]
"""Of an agent inside the engine, ``agent`` or ``tenant/agent``."""
KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")]
"""Of an agent or a tenant with an API key."""
HandleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{16,128}$")]
"""Of a segment: random, and no permission."""


def is_agent(name: str) -> bool:
    """Whether an agent inside the engine may be called so."""
    return re.fullmatch(_QUALIFIED, name) is not None


def split_tenant(name: str) -> tuple[str, str]:
    """``acme/intake`` is ``("acme", "intake")``; a name without tenant has ``""``."""
    tenant, slash, agent = name.partition("/")
    return (tenant, agent) if slash else ("", name)


class EdgeName(NamedTuple):
    """A hop by its two agents. Two spellings of it are kept in files that outlive a release:
    ``a->b`` in reports, topologies and tables of guards, ``a>b`` in signed manifests."""

    source: str
    audience: str

    @classmethod
    def parse(cls, text: str) -> EdgeName:
        """Either spelling. Raises ``ValueError`` for what names no two agents."""
        source, arrow, audience = text.partition("->" if "->" in text else ">")
        if not (source and arrow and audience):
            raise ValueError(f"{text!r} names no edge; write `source->audience`")
        return cls(source, audience)

    def __str__(self) -> str:
        return f"{self.source}->{self.audience}"

    @property
    def in_manifest(self) -> str:
        return f"{self.source}>{self.audience}"

    @property
    def in_words(self) -> str:
        """For messages and logs."""
        return f"{self.source} -> {self.audience}"
