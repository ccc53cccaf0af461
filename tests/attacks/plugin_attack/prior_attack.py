"""The prior: guess the most frequent value of a field, whatever the segment says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lcguard.attacks.base import BaseAttack, register
from lcguard.protocols import AttackData, Guess


@register("prior")
class PriorAttack(BaseAttack):
    goal = "name the most frequent value of each forbidden field"
    access = "black-box"
    reference = "counting"

    @dataclass(frozen=True)
    class Config:
        give_up: int = 0
        """So many secrets are not scored: they end in an error."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.best: dict[str, tuple[int, ...]] = {}

    def fit(self, pairs: AttackData, *, seed: int = 0) -> PriorAttack:
        seen: dict[str, Counter[tuple[int, ...]]] = {}
        for secrets in pairs.secrets:
            for s in secrets:
                seen.setdefault(s.field, Counter())[s.ids] += 1
        self.best = {field: counts.most_common(1)[0][0] for field, counts in seen.items()}
        return self

    def recover(self, data: AttackData) -> list[Guess]:
        out = []
        for record, secrets in zip(data.record_ids, data.secrets, strict=True):
            for s in secrets:
                failed = len(out) < self.config.give_up
                ids = None if failed else self.best.get(s.field, ())
                out.append(Guess(record, s.category, s.field, ids))
        return out
