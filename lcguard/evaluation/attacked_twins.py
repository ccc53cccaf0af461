"""What fresh attackers recover from the twins that a detector makes of records.

For training in rounds and for its ablation, where the same records are read again and again: they
come with the features that the detector reads, so that the model prefills the twins alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lcguard.agents.backends.hf import HFBackend
from lcguard.evaluation.load import make_attack
from lcguard.evaluation.outcomes import Outcome
from lcguard.evaluation.plan import AttackSpec
from lcguard.evaluation.said import outcome_of
from lcguard.guards import FrozenGuard
from lcguard.guards.twin import TwinGuard
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.records import masks
from lcguard.training.dataset import attack_data, context_without
from lcguard.training.fit_detector import ReadRecords

AT_ONCE = 16
"""Records whose twins are attacked together."""
NOT_ASKED, RESISTED, RECOVERED = range(3)


@dataclass(frozen=True)
class Attackers:
    """Fitted anew for each guard."""

    backend: HFBackend
    attacks: tuple[AttackSpec, ...]
    seed: int = 0
    by_reply: bool = False
    """Whether a reply of the receiver's counts by what it says."""

    def recovered(
        self, guard: TwinGuard, pairs: ReadRecords, victims: ReadRecords
    ) -> list[list[int]]:
        """Of each victim, for each of its secrets, ``RECOVERED`` where any of the attackers says
        it, ``NOT_ASKED`` where none could be scored. ``pairs``: records whose values they know."""
        special = self.backend.special
        known = attack_data(pairs.records, twins(guard, self.backend, pairs, self.seed), special)
        fitted = [
            make_attack(self.backend, spec, FrozenGuard(guard)).fit(known, seed=self.seed)
            for spec in self.attacks
        ]
        found = [[NOT_ASKED] * len(r.secrets()) for r in victims.records]
        for first in range(0, len(found), AT_ONCE):
            part = victims.part(range(first, min(first + AT_ONCE, len(found))))
            data = attack_data(part.records, twins(guard, self.backend, part, self.seed), special)
            for attack in fitted:
                by_reply = self.by_reply and attack.replies
                for row, k, outcome in self._judged(data, attack.recover(data), by_reply):
                    if outcome in (Outcome.SUCCESS, Outcome.RESISTED):
                        code = RECOVERED if outcome is Outcome.SUCCESS else RESISTED
                        found[first + row][k] = max(found[first + row][k], code)
        return found

    def _judged(
        self, data: AttackData, guesses: Sequence[Guess], by_reply: bool
    ) -> Iterator[tuple[int, int, Outcome]]:
        """Record, secret and outcome of each guess. An attack may leave out whole records, never
        part of one."""
        grouped: dict[str, list[Guess]] = {}
        for guess in guesses:
            grouped.setdefault(guess.record_id, []).append(guess)
        for row, name in enumerate(data.record_ids):
            pairs = zip(grouped.get(name, []), data.secrets[row], strict=name in grouped)
            for k, (guess, secret) in enumerate(pairs):
                yield row, k, outcome_of(guess, secret, self.backend.decode, by_reply)


@torch.no_grad()
def twins(guard: TwinGuard, backend: HFBackend, read: ReadRecords, seed: int) -> KVBatch:
    """Segments of records under their own policies, as ``guard_all`` makes them."""
    contexts: list[tuple[int, ...]] = []
    for first in range(0, len(read.records), AT_ONCE):
        records, x, valid = read.rows(range(first, min(first + AT_ONCE, len(read.records))))
        marks = guard.marks_of(guard.detector(x, valid), valid, masks(records))
        contexts += [
            context_without(record, row, guard.placeholder, backend.special, seed)
            for record, row in zip(records, marks, strict=True)
        ]
    return backend.source.prefill(contexts, AT_ONCE)
