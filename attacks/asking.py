"""What attackers share who have a model answer questions about forbidden values: pairs of question
and value to learn from, and the replies as guesses."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from lcguard.attacks.base import ScheduledAttack
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.records import IGNORE, PackedQuestions, TokenQuestion, pack_rows
from lcguard.source import ModelSource


class AskingAttack(ScheduledAttack):
    """Subclasses say who answers (``answerer``) and what it reads (``read_as``), and have the
    options ``questions`` and ``max_tokens``."""

    replies: ClassVar[bool] = True

    def answerer(self) -> ModelSource:
        """Who is asked. Raises ``ValueError`` if not fitted."""
        raise NotImplementedError(f"attack {self.name!r} does not say who answers")

    def read_as(self, kv: KVBatch) -> KVBatch:
        """What the answerer reads instead of the segments."""
        return kv

    def draw(self, pairs: AttackData, rng: random.Random) -> tuple[KVBatch, PackedQuestions]:
        """Segments of a step, and questions about them with the values as answers."""
        config: Any = self.config
        rows = self._askable(pairs)
        at = [rng.choice(rows) for _ in range(config.fit.batch)]
        asked = [_questions(pairs, i, rng, config.questions) for i in at]
        return pairs.kv[torch.tensor(at)].trim(), pack_rows(asked, self.known.source.pad_id)

    def _askable(self, pairs: AttackData) -> list[int]:
        """Records with a question. Raises ``ValueError`` where there is nothing to learn from."""
        if not any(pairs.secrets):
            raise ValueError("no secret in the training pairs: nothing is forbidden on these edges")
        rows = [i for i, prompts in enumerate(pairs.prompts) if any(prompts)]
        if not rows:
            raise ValueError("no secret in the training pairs has a question to ask the receiver")
        return rows

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """Greedy replies, and the cross-entropy of the true value."""
        source = self.answerer()
        flat = [
            (i, k) for i, asked in enumerate(data.prompts) for k in range(len(asked)) if asked[k]
        ]
        out: dict[tuple[int, int], Guess] = {}
        for first in range(0, len(flat), 32):
            part = flat[first : first + 32]
            kv = self.read_as(data.kv[torch.tensor([i for i, _ in part])].trim())
            asked = [data.prompts[i][k] for i, k in part]
            most = self.config.max_tokens
            said = source.generate(kv, asked, most, data.special.end_id)
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
