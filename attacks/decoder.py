"""Neural inversion: a decoder with attention over all layers' guarded keys and values.

The adversarial decoder of arXiv 2605.22786, made stronger: it is told which field to look for, it
has a dense auxiliary target (which token stood where) and a pointer. ``warm`` starts it from the
weights of the same attack fitted on clean KV, the quickest way to break a guard that hides.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.attacks.base import BaseAttack, ScheduledAttack, register
from lcguard.attacks.network import Network, Read
from lcguard.protocols import AttackData, Guess
from lcguard.records import IGNORE, pad

_VOCABULARY = ("head", "writer.token", "writer.field")


class Targets(NamedTuple):
    """The secrets of some records, flattened to N."""

    rows: Tensor
    """``[N]`` index of the record."""
    fields: Tensor
    prefix: Tensor
    """``[N, K]``."""
    labels: Tensor
    """``[N, K]``: the value's tokens, its end, ``IGNORE``."""


@register("decoder")
class DecoderAttack(ScheduledAttack):
    goal = "recover forbidden values verbatim from a guarded segment"
    reference = "arXiv 2605.22786, strengthened"
    starts_from = "decoder"

    @dataclass(frozen=True)
    class Config(ScheduledAttack.Config):
        vocab: int = 0
        """Size of the agent's vocabulary; 0 takes it from the pairs."""
        width: int = 96
        blocks: int = 1
        max_tokens: int = 40
        token_loss: float = 0.5
        """Weight of the auxiliary target."""
        token_every: int = 4
        """One position in so many is computed in a step."""

    def __init__(self, config: Config | None = None, warm: DecoderAttack | None = None) -> None:
        super().__init__(config)
        self.warm = warm
        self.net: Network | None = None
        self.fields: dict[str, int] = {}
        self.steps_done = 0
        self.held_back = 0.0
        """Exact match on held-back training pairs at the last check."""

    def start_from(self, clean: BaseAttack) -> None:
        if not isinstance(clean, DecoderAttack):
            raise ValueError(f"attack {self.name!r} starts from a decoder, not {clean.name!r}")
        self.warm = clean

    def as_adversary(self) -> DecoderAttack:
        return self

    @classmethod
    def stressed(cls, options: Mapping[str, Any], steps: int, width: int) -> dict[str, Any]:
        wide = int(options.get("width", cls.Config().width)) * width
        return {**super().stressed(options, steps, width), "width": wide}

    # -- fitting

    def start(self, pairs: AttackData, *, seed: int = 0) -> None:
        """Makes the network (or copies the warm one) without training it."""
        torch.manual_seed(seed)
        if self.warm is not None:
            if self.warm.net is None:
                raise ValueError("the warm attack is not fitted; fit it on clean KV first")
            self.net, self.fields = copy.deepcopy(self.warm.net), dict(self.warm.fields)
            self.net.to(pairs.kv.keys.device)
            return
        names = {s.field for secrets in pairs.secrets for s in secrets}
        self.fields = {name: i for i, name in enumerate(sorted(names))}
        channels = self.inputs(pairs.subset([0])).shape[-1]
        vocab = self.config.vocab or pairs.special.vocab
        # one entry more: a field that the training pairs never had
        self.net = Network(
            channels, vocab, len(self.fields) + 1, self.config.width, self.config.blocks
        ).to(pairs.kv.keys.device)
        sample = pairs.subset(range(min(256, len(pairs))))
        self.net.reader.fit_statistics(self.inputs(sample)[sample.kv.trim().valid])

    def fit(self, pairs: AttackData, *, seed: int = 0) -> DecoderAttack:
        """Raises ``ValueError`` where the pairs hold no secret."""
        if not any(pairs.secrets):
            raise ValueError("no secret in the training pairs: nothing is forbidden on these edges")
        self.start(pairs, seed=seed)
        c, rng = self.config.fit, random.Random(seed)
        order = list(range(len(pairs)))
        rng.shuffle(order)
        n_check = min(96, len(order) // 5) if c.stop_at is not None else 0
        check, order = pairs.subset(order[:n_check]), order[n_check:]
        optimizers = self.optimizers()
        at = len(order)
        for step in range(c.steps):
            if at + c.batch > len(order):
                rng.shuffle(order)
                at = 0
            batch = pairs.subset(order[at : at + c.batch])
            at += c.batch
            for optimizer, base in zip(optimizers, (c.lr, c.muon_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * c.rate(step)
            self.update(batch, optimizers)
            self.steps_done = step + 1
            if n_check and step and step % c.check_every == 0:
                self.held_back = self.exact_rate(check)
                if c.stop_at is not None and self.held_back >= c.stop_at:
                    break
        self.network.eval()
        return self

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the hidden matrices, AdamW for the rest: a fraction of AdamW's steps alone."""
        named = list(self.network.named_parameters())
        hidden = [p for n, p in named if p.ndim == 2 and not n.startswith(_VOCABULARY)]
        rest = [p for n, p in named if p.ndim != 2 or n.startswith(_VOCABULARY)]
        c = self.config.fit
        return [
            torch.optim.AdamW(rest, lr=c.lr, weight_decay=0.01),
            torch.optim.Muon(hidden, lr=c.muon_lr, weight_decay=0.01),
        ]

    def update(self, batch: AttackData, optimizers: Sequence[torch.optim.Optimizer]) -> float:
        """One step on already guarded pairs; returns the loss in nats."""
        self.network.train()
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    def loss(self, batch: AttackData, *, auxiliary: bool = True) -> Tensor:
        """Cross-entropy of the secrets (a mean over tokens, nats), differentiable in the KV."""
        kv = batch.kv.trim()
        read = self.network.reader(self.inputs(batch), kv.valid)
        targets = self.targets(batch)
        out: Tensor = read.tokens.sum() * 0.0
        if len(targets.rows):
            due = targets.labels != IGNORE
            logits = self.network.head(self._write(read, kv.valid, targets)[due])
            out = F.cross_entropy(logits, targets.labels[due])
        ids = aligned(batch.context_ids, kv.valid.shape[1]).to(kv.valid.device)
        # no known token (a blind floor, a guard that moves tokens): the mean over none is NaN
        known = ids != IGNORE
        if auxiliary and self.config.token_loss and bool(known.any()):
            # a share of the positions teaches as much as all, at a fraction of the vocabulary's
            # cost; which ones is a function of the batch, so that training resumes exactly
            at = torch.arange(ids.shape[1], device=ids.device) + ids.clamp_min(0).sum(1)[:, None]
            keep = known & (at % self.config.token_every == 0)
            keep = keep if bool(keep.any()) else known
            logits = self.network.head(read.tokens[keep])
            out = out + self.config.token_loss * F.cross_entropy(logits, ids[keep])
        return out

    def inputs(self, batch: AttackData) -> Tensor:
        """What the reader sees of every token, ``[B, T, channels]``; T as in ``kv.trim()``."""
        return batch.kv.trim().features().float()

    def _write(self, read: Read, valid: Tensor, targets: Targets) -> Tensor:
        """What the head turns into the next token, ``[N, K, d]``."""
        out: Tensor = self.network.writer(read, targets.rows, valid, targets.fields, targets.prefix)
        return out

    def log_probs(self, batch: AttackData) -> tuple[Tensor, Tensor, Tensor]:
        """Fields ``[N]``, labels ``[N, K]`` and log-probabilities ``[N, K, V]``, differentiable."""
        kv, targets = batch.kv.trim(), self.targets(batch)
        read = self.network.reader(self.inputs(batch), kv.valid)
        logits = self.network.head(self._write(read, kv.valid, targets))
        return targets.fields, targets.labels, logits.log_softmax(-1)

    @property
    def network(self) -> Network:
        if self.net is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        return self.net

    def targets(self, batch: AttackData) -> Targets:
        flat = [(i, s) for i, secrets in enumerate(batch.secrets) for s in secrets]
        start = self.network.writer.token.num_embeddings - 1
        end = batch.special.end_id
        values = [s.ids[: self.config.max_tokens] for _, s in flat]
        unknown = len(self.fields)
        targets = (
            torch.tensor([i for i, _ in flat], dtype=torch.long),
            torch.tensor([self.fields.get(s.field, unknown) for _, s in flat], dtype=torch.long),
            pad([(start, *v) for v in values], 0),
            pad([(*v, end) for v in values], IGNORE),
        )
        return Targets(*(t.to(batch.kv.keys.device) for t in targets))

    # -- attacking

    @torch.no_grad()
    def exact_rate(self, data: AttackData) -> float:
        """Share of secrets whose every token is the argmax given the true ones before it."""
        right, total = 0, 0
        self.network.eval()
        for part in _batches(data, 64):
            _, _, exact = self._score(part)
            right, total = right + int(exact.sum()), total + len(exact)
        return right / total if total else 0.0

    def _score(self, part: AttackData) -> tuple[Tensor, Tensor, Tensor]:
        """Per secret: cross-entropy in nats, token accuracy, exact match; each ``[N]``."""
        kv, targets = part.kv.trim(), self.targets(part)
        if not len(targets.rows):
            return torch.zeros(0), torch.zeros(0), torch.zeros(0)
        read = self.network.reader(self.inputs(part), kv.valid)
        logp = self.network.head(self._write(read, kv.valid, targets)).log_softmax(-1)
        due = targets.labels != IGNORE
        nll = -(logp.gather(-1, targets.labels.clamp_min(0)[..., None])[..., 0] * due).sum(1)
        hit = (logp.argmax(-1) == targets.labels) & due
        value = due.clone()
        # the end is no token of the value
        value[torch.arange(len(due), device=due.device), due.sum(1) - 1] = False
        accuracy = (hit & value).sum(1) / value.sum(1).clamp_min(1)
        return nll, accuracy, (hit | ~due).all(1).float()

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """Greedy guesses; the true values serve for cross-entropy and token accuracy alone."""
        self.network.eval()
        out: list[Guess] = []
        for part in _batches(data, 64):
            nll, accuracy, _ = self._score(part)
            guesses = self._greedy(part)
            flat = [
                (r, s)
                for r, secrets in zip(part.record_ids, part.secrets, strict=True)
                for s in secrets
            ]
            out += [
                Guess(record, s.category, s.field, guess, float(nll[i]), float(accuracy[i]))
                for i, ((record, s), guess) in enumerate(zip(flat, guesses, strict=True))
            ]
        return out

    def _greedy(self, part: AttackData) -> list[tuple[int, ...]]:
        kv, targets = part.kv.trim(), self.targets(part)
        if not len(targets.rows):
            return []
        read = self.network.reader(self.inputs(part), kv.valid)
        prefix, end = targets.prefix[:, :1], part.special.end_id
        done = torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
        for _ in range(self.config.max_tokens + 1):
            written = self.network.writer(read, targets.rows, kv.valid, targets.fields, prefix)
            token = self.network.head(written[:, -1]).argmax(-1)
            done |= token == end
            if bool(done.all()):
                break
            prefix = torch.cat((prefix, torch.where(done, end, token)[:, None]), 1)
        return [_until(row, end) for row in prefix[:, 1:].tolist()]


def _until(row: Sequence[int], end: int) -> tuple[int, ...]:
    return tuple(row[: row.index(end)]) if end in row else tuple(row)


def aligned(ids: Tensor, width: int) -> Tensor:
    """``[B, width]``: a guard's output may be longer or shorter than the context was."""
    return F.pad(ids, (0, max(0, width - ids.shape[1])), value=IGNORE)[:, :width]


def _batches(data: AttackData, size: int) -> list[AttackData]:
    return [data.subset(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]
