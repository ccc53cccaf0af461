"""Injection: load the segment as the receiver would and simply ask for the secret.

The receiver's own model is the attacker, so nothing is fitted but the category's format: an answer
may only use characters that values of the field have. From *Shadow in the Cache*
(arXiv 2508.09442), with the question that the receiver understands best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lcguard.attacks.base import BaseAttack, register
from lcguard.protocols import AttackData, Guess


@register("injection")
class InjectionAttack(BaseAttack):
    goal = "have the receiver's own model answer questions about forbidden fields"
    source = "arXiv 2508.09442"
    fitted: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        max_tokens: int = 40
        restrict: bool = True
        """Only characters that values of the field are made of."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._allowed: dict[str, Tensor] | None = None

    def fit(self, pairs: AttackData, *, seed: int = 0) -> InjectionAttack:
        """Learns each field's alphabet from the attacker's own records."""
        decode = self.known.decode
        self._allowed = {}
        if not self.config.restrict:
            return self
        letters: dict[str, set[str]] = {}
        for secrets in pairs.secrets:
            for s in secrets:
                letters.setdefault(s.field, {" "}).update(decode(s.ids))
        texts = [decode([i]) for i in range(int(pairs.meta["vocab"]))]
        special = set(pairs.meta.get("special_ids", ()))
        for field, known in letters.items():
            ok = [i not in special and bool(t) and set(t) <= known for i, t in enumerate(texts)]
            self._allowed[field] = torch.tensor(ok)
        return self

    def recover(self, data: AttackData) -> list[Guess]:
        """Greedy answers. ``data.meta['prompts']`` holds one prompt per record and secret."""
        if self._allowed is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        prompts: Sequence[Sequence[Sequence[int]]] = data.meta["prompts"]
        flat = [
            (i, s, prompt)
            for i, secrets in enumerate(data.secrets)
            for s, prompt in zip(secrets, prompts[i], strict=True)
        ]
        out: list[Guess] = []
        everything = torch.ones(int(data.meta["vocab"]), dtype=torch.bool)
        for first in range(0, len(flat), 128):
            part = flat[first : first + 128]
            rows = torch.tensor([i for i, _, _ in part])
            allowed = torch.stack([self._allowed.get(s.field, everything) for _, s, _ in part])
            answers = self.known.source.generate(
                data.kv[rows].trim(), [p for _, _, p in part], self.config.max_tokens,
                int(data.meta["end_id"]), allowed,
            )  # fmt: skip
            out += [
                Guess(data.record_ids[i], s.category, s.field, answer)
                for (i, s, _), answer in zip(part, answers, strict=True)
            ]
        return out
