"""Agents on transformers: all turns of a call are one batch, prefilled in one forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lcguard.agents.backends.base import Ask, Channel, Reference, Turn
from lcguard.agents.backends.hf import HFBackend
from lcguard.noise import noise_key
from lcguard.protocols import Guard, KVBatch
from lcguard.records import TokenRecord, masks
from lcguard.rule import Rule
from lcguard.training.dataset import twin_contexts

ANY = "*"


@dataclass(frozen=True)
class HFReference:
    """A row of KV, or on the text channel the tokens themselves."""

    key: str
    row: KVBatch | None
    ids: tuple[int, ...] = ()
    opened: KVBatch | None = None
    """What the audience reads where that is not what crossed the hop."""

    def read(self) -> KVBatch:
        """As the audience reads it."""
        return self.kv() if self.opened is None else self.opened

    def kv(self) -> KVBatch:
        if self.row is None:
            raise ValueError(f"{self.key}: a text handoff has no KV; use channel kv or guarded")
        return self.row


class HFAgents:
    """Implements ``AgentBackend``.

    Args:
        guards: guard by link name (``a->b``), or under ``*`` for every other link.
        seed: of the guards' noise; attackers and victims get different ones.

    Raises ``ValueError`` where the channel is ``guarded`` and there is no guard.
    """

    def __init__(
        self,
        model: HFBackend,
        channel: Channel = "guarded",
        guards: Mapping[str, Guard] | None = None,
        seed: int = 0,
        batch: int = 64,
    ) -> None:
        if channel == "guarded" and not guards:
            raise ValueError("channel 'guarded' has no guard: give guards={'*': guard}")
        self.model, self.channel, self.seed, self.batch = model, channel, seed, batch
        self.guards = dict(guards or {}) if channel == "guarded" else {}

    def publish(self, turns: Sequence[Turn]) -> list[list[Reference]]:
        out: list[list[Reference]] = [[] for _ in turns]
        if self.channel == "text":
            for i, turn in enumerate(turns):
                out[i] = [HFReference(self._key(turn, r), None, turn.ids) for r in turn.records]
            return out
        # those that consume something and those that do not are prefilled apart: no empty caches
        for some in (True, False):
            at = [i for i, t in enumerate(turns) if bool(t.consume) is some]
            for first in range(0, len(at), self.batch):
                rows = at[first : first + self.batch]
                for i, made in zip(rows, self._publish([turns[i] for i in rows]), strict=True):
                    out[i] = made
        return out

    def _publish(self, turns: Sequence[Turn]) -> list[list[Reference]]:
        source = self.model.source
        on = self.consumed([t.consume for t in turns]) if turns[0].consume else None
        raw = source.prefill([t.ids for t in turns], len(turns), on)
        out: list[list[Reference]] = [[] for _ in turns]
        made: dict[str, HFReference] = {}
        for k in range(max(len(t.records) for t in turns)):
            due = [i for i, t in enumerate(turns) if k < len(t.records)]
            fresh = [i for i in due if self._key(turns[i], turns[i].records[k]) not in made]
            for guard, rows in self._by_guard(turns, k, fresh):
                records = [turns[i].records[k] for i in rows]
                kv = raw[torch.tensor(rows)]
                if guard is not None:
                    past = None if on is None else on[torch.tensor(rows)]
                    kv = self._guard(guard, records, kv, past)
                read = kv if guard is None else guard.opened(kv)
                for j, i in enumerate(rows):
                    key, at = self._key(turns[i], records[j]), slice(j, j + 1)
                    opened = None if read is kv else read[at].trim()
                    made[key] = HFReference(key, kv[at].trim(), opened=opened)
            for i in due:
                out[i].append(made[self._key(turns[i], turns[i].records[k])])
        return out

    def _by_guard(
        self, turns: Sequence[Turn], k: int, rows: Sequence[int]
    ) -> list[tuple[Guard | None, list[int]]]:
        groups: dict[int, tuple[Guard | None, list[int]]] = {}
        for i in rows:
            guard = self._guard_of(turns[i].records[k])
            groups.setdefault(id(guard), (guard, []))[1].append(i)
        return list(groups.values())

    def _guard_of(self, record: TokenRecord) -> Guard | None:
        if self.channel != "guarded":
            return None
        guard = self.guards.get(record.edge) or self.guards.get(ANY)
        if guard is None:
            raise ValueError(f"link {record.edge} has no guard; give one under its name or '*'")
        return guard

    def _guard(
        self, guard: Guard, records: Sequence[TokenRecord], kv: KVBatch, on: KVBatch | None
    ) -> KVBatch:
        twin = None
        if guard.needs_twin:
            contexts = twin_contexts(guard, records, kv, self.model.special)
            twin = self.model.source.prefill(contexts, len(contexts), on)
        # one draw per segment: whoever receives it under the same policy receives the same noise
        keys = [noise_key(self.seed, f"{r.record_id}/{_policy(r)}") for r in records]
        return guard(kv, masks(records), keys=keys, twin=twin).kv

    def _key(self, turn: Turn, record: TokenRecord) -> str:
        guard = self._guard_of(record)
        return (
            f"{turn.scenario}/{turn.agent}/{_policy(record)}/{'' if guard is None else id(guard)}"
        )

    def consumed(self, references: Sequence[Sequence[Reference]]) -> KVBatch:
        """What each reader attends to: its segments behind each other."""
        if self.channel == "text":
            texts = [[i for r in row for i in _tokens(r)] for row in references]
            return self.model.source.prefill(texts, self.batch)
        return KVBatch.stack([KVBatch.join([_read(r) for r in row]) for row in references])

    def answers(self, asks: Sequence[Ask]) -> list[list[bool]]:
        out: list[list[bool]] = [[] for _ in asks]
        due = [i for i, a in enumerate(asks) if a.questions and a.consume]
        for first in range(0, len(due), self.batch):
            rows = due[first : first + self.batch]
            records = [replace(_EMPTY, questions=asks[i].questions) for i in rows]
            kv = self.consumed([asks[i].consume for i in rows])
            found = self.model.source.exact_match(records, kv, batch=self.batch)
            for i, right in zip(rows, found, strict=True):
                out[i] = right
        return out


_EMPTY = TokenRecord("", "", "", "", "", (), (), (), Rule())


def _read(reference: Reference) -> KVBatch:
    return reference.read() if isinstance(reference, HFReference) else reference.kv()


def _tokens(reference: Reference) -> tuple[int, ...]:
    return reference.ids if isinstance(reference, HFReference) else ()


def _policy(record: TokenRecord) -> str:
    named = f"{','.join(record.forbid)}/{','.join(record.derive)}"
    return hashlib.sha256(named.encode()).hexdigest()[:16]
