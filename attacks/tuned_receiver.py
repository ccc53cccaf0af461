"""The receiving model itself, fine-tuned to say what it must not: the strongest reader there is.

Its adapters (LoRA, arXiv 2106.09685) learn on guarded segments of the attacker's own, each with a
question about a forbidden field and the value as the answer; then it is asked about the victims'.
Every other attack has to learn the model's language of keys and values, this one has it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from lcguard.attacks.asking import AskingAttack
from lcguard.attacks.base import FitConfig, ScheduledAttack, register
from lcguard.protocols import AttackData
from lcguard.source import ModelSource
from lcguard.training.fit_reader import ReaderConfig, fit_reader, merged


@register("tuned_receiver")
class TunedReceiverAttack(AskingAttack):
    goal = "have the receiver's own model, fine-tuned on guarded segments, say forbidden values"
    reference = "adapters of arXiv 2106.09685, on the receiver"

    @dataclass(frozen=True)
    class Config(ScheduledAttack.Config):
        rank: int = 8
        """Of the adapters."""
        questions: int = 4
        """About one record in a step, at most."""
        max_tokens: int = 40
        fit: FitConfig = field(
            default_factory=lambda: FitConfig(steps=80, batch=8, lr=1e-3, warmup=8), kw_only=True
        )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._reader: Any = None

    def fit(self, pairs: AttackData, *, seed: int = 0) -> TunedReceiverAttack:
        """Starts from the model that the receiver answers with. Raises ``ValueError`` where the
        pairs hold no secret, or peft is not installed."""
        fit, rng = self.config.fit, random.Random(f"tuned/{seed}")
        rank = self.config.rank
        config = ReaderConfig(rank, 2 * rank, fit.steps, fit.lr, fit.warmup, seed)
        with torch.enable_grad():
            self._reader = merged(
                fit_reader(self.known.source, lambda step: self.draw(pairs, rng), config)
            )
        return self

    def answerer(self) -> ModelSource:
        if self._reader is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        plain = self.known.source
        return ModelSource(plain.model, plain.pad_id, reader=self._reader)
