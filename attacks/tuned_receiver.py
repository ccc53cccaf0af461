"""The receiving model itself, fine-tuned to say what it must not: the strongest reader there is.

Its adapters (LoRA, arXiv 2106.09685) learn on guarded segments of the attacker's own, each with a
question about a forbidden field and the value as the answer; then it is asked about the victims'.
Every other attack has to learn the model's language of keys and values, this one has it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lcguard.attacks.base import FitConfig, ScheduledAttack, register
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.records import IGNORE, PackedQuestions, TokenQuestion, pack_rows
from lcguard.source import ModelSource
from lcguard.training.fit_reader import ReaderConfig, fit_reader, merged


@register("tuned_receiver")
class TunedReceiverAttack(ScheduledAttack):
    goal = "have the receiver's own model, fine-tuned on guarded segments, say forbidden values"
    reference = "adapters of arXiv 2106.09685, on the receiver"
    replies: ClassVar[bool] = True

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
        if not any(pairs.secrets):
            raise ValueError("no secret in the training pairs: nothing is forbidden on these edges")
        rows = [i for i, prompts in enumerate(pairs.prompts) if any(prompts)]
        if not rows:
            raise ValueError("no secret in the training pairs has a question to ask the receiver")
        c, source, rng = self.config, self.known.source, random.Random(f"tuned/{seed}")

        def draw(step: int) -> tuple[KVBatch, PackedQuestions]:
            at = [rng.choice(rows) for _ in range(c.fit.batch)]
            asked = [_questions(pairs, i, rng, c.questions) for i in at]
            return pairs.kv[torch.tensor(at)].trim(), pack_rows(asked, source.pad_id)

        config = ReaderConfig(c.rank, 2 * c.rank, c.fit.steps, c.fit.lr, c.fit.warmup, seed)
        with torch.enable_grad():
            self._reader = merged(fit_reader(source, draw, config))
        return self

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """Greedy replies, and the cross-entropy of the true value."""
        if self._reader is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        plain = self.known.source
        source = ModelSource(plain.model, plain.pad_id, reader=self._reader)
        flat = [
            (i, k) for i, asked in enumerate(data.prompts) for k in range(len(asked)) if asked[k]
        ]
        out: dict[tuple[int, int], Guess] = {}
        for first in range(0, len(flat), 32):
            part = flat[first : first + 32]
            kv = data.kv[torch.tensor([i for i, _ in part])].trim()
            asked = [data.prompts[i][k] for i, k in part]
            said = source.generate(kv, asked, self.config.max_tokens, data.special.end_id)
            packed = pack_rows([[_question(data, i, k)] for i, k in part], source.pad_id)
            nats = _nats(source, kv, packed)
            for (i, k), ids, nll in zip(part, said, nats, strict=True):
                s = data.secrets[i][k]
                out[i, k] = Guess(data.record_ids[i], s.category, s.field, ids, nll)
        return [
            out.get((i, k)) or Guess(data.record_ids[i], s.category, s.field, ())
            for i, secrets in enumerate(data.secrets)
            for k, s in enumerate(secrets)
        ]


def _question(data: AttackData, row: int, which: int) -> TokenQuestion:
    secret = data.secrets[row][which]
    answer = (*secret.ids, data.special.end_id)
    return TokenQuestion(
        tuple(data.prompts[row][which]), answer, secret.field, secret.category, "direct", False
    )


def _questions(data: AttackData, row: int, rng: random.Random, most: int) -> list[TokenQuestion]:
    asked = [k for k, prompt in enumerate(data.prompts[row]) if prompt]
    return [_question(data, row, k) for k in rng.sample(asked, min(len(asked), most))]


def _nats(source: ModelSource, kv: KVBatch, packed: PackedQuestions) -> Iterable[float]:
    """Cross-entropy of each row's answer, without its end."""
    due = packed.labels != IGNORE
    logp = source.answer_logits(kv, packed).float().log_softmax(-1).cpu()
    each = torch.zeros(due.shape)
    each[due] = -logp.gather(1, packed.labels[due][:, None])[:, 0]
    last = due.shape[1] - 1 - due.flip(1).int().argmax(1)
    each[torch.arange(len(due)), last] = 0.0
    found: Sequence[float] = each.sum(1).tolist()
    return found
