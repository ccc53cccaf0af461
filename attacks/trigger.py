"""Universal trigger: the same few tokens planted before every record, so that more leaks.

After universal adversarial triggers (arXiv 1908.07125). The attacker writes a message that the
sender reads before its private record; keys and values of the record's tokens, and a guard that
reads its surroundings, depend on it. First-order swaps (HotFlip): token i of the trigger becomes v
with the least ``E_v . dloss/dE_i``, the loss being a fixed reader's cross-entropy on the attacker's
own records behind the guard, as long as the agents' model finds the trigger no stranger than
``max_perplexity``. Where the guard has no gradient, candidates are the tokens the model expects.
Every candidate is tried through the guard itself, with its noise, and kept if the reader gains.

An *active* attack: victims must have read the trigger. ``plant`` makes the segments that they then
publish; it reads the victims' contexts because the senders do, not because the attacker can.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.attacks.base import FitConfig, ScheduledAttack, register
from lcguard.attacks.planting import (
    context_known,
    context_of,
    insert,
    lead,
    publish,
    with_message,
)
from lcguard.attacks.probe import ProbeAttack
from lcguard.attacks.soft import embedding_table, guarded_mean, soft_prefill
from lcguard.protocols import AttackData, Guess
from lcguard.records import IGNORE


@register("trigger")
class TriggerAttack(ScheduledAttack):
    goal = "make the sender read a message that opens the guard, then read the forbidden tokens"
    reference = "arXiv 1908.07125, on KV"

    @dataclass(frozen=True)
    class Config(ScheduledAttack.Config):
        length: int = 4
        """Tokens of the trigger."""
        max_perplexity: float = 300.0
        """Under the agents' own model, of the trigger after what precedes it."""
        rounds: int = 2
        """Times that every token is reconsidered."""
        candidates: int = 8
        """Tokens tried at a place."""
        records: int = 64
        """Own records that they are tried on; as many again decide whether to use a trigger."""
        width: int = 192
        """Of the reader, a ``probe``."""
        fit: FitConfig = field(
            default_factory=lambda: FitConfig(steps=300, batch=2048), kw_only=True
        )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        c = self.config
        if c.length < 1 or c.candidates < 1 or c.rounds < 0 or c.records < 1:
            raise ValueError(
                f"length={c.length}, candidates={c.candidates} and records={c.records} must be 1 "
                f"or more, rounds={c.rounds} 0 or more"
            )
        self.trigger_ids: tuple[int, ...] = ()
        """Empty where no trigger helped, or no context was known."""
        self.reader: ProbeAttack | None = None
        self.special: frozenset[int] = frozenset()
        self._salt = ""

    # -- fitting

    def fit(self, pairs: AttackData, *, seed: int = 0) -> TriggerAttack:
        """Raises ``ValueError`` for pairs without secrets, or a perplexity that cannot be met."""
        self.special, self._salt = frozenset(pairs.special.special_ids), f"trigger {seed}"
        self.trigger_ids = ()
        self.reader = self._read(pairs, seed)
        known = [i for i, s in enumerate(pairs.secrets) if s and context_known(pairs, i)]
        if len(known) < 4:  # a blind floor: nothing to plant into
            return self
        random.Random(seed).shuffle(known)
        n = min(self.config.records, len(known) // 2)
        tried, judged = pairs.subset(known[:n]), pairs.subset(known[n : 2 * n])
        trigger = self._search(tried)
        fitted = self._read(self._planted(pairs, trigger, "fit"), seed)
        # by records that the search did not see, each reader on the segments it was fitted for
        without = self._loss(self.reader, self._planted(judged, (), "judge"))
        if self._loss(fitted, self._planted(judged, trigger, "judge")) < without:
            self.trigger_ids, self.reader = trigger, fitted
        return self

    def _read(self, pairs: AttackData, seed: int) -> ProbeAttack:
        c = self.config
        return ProbeAttack(ProbeAttack.Config(width=c.width, fit=c.fit)).fit(pairs, seed=seed)

    def _search(self, data: AttackData) -> tuple[int, ...]:
        assert self.reader is not None
        best = self._start(data)
        cost = self.perplexity([best], data)[0]
        if cost > self.config.max_perplexity:
            raise ValueError(
                f"max_perplexity={self.config.max_perplexity} is below {cost:.0f}, that of the "
                "model's own continuation; raise it"
            )
        least = self._loss(self.reader, self._planted(data, best, "search"))
        for _ in range(self.config.rounds):
            before = best
            for at in range(len(best)):
                for other in self._swaps(data, best, at):
                    loss = self._loss(self.reader, self._planted(data, other, "search"))
                    if loss < least:
                        least, best = loss, other
            if best == before:
                break
        return best

    @torch.no_grad()
    def _start(self, data: AttackData) -> tuple[int, ...]:
        """What the model itself would write there, greedily."""
        ids = self._opening(data)
        first = len(ids)
        if not ids:  # nothing precedes: it begins as contexts do
            ids = [Counter(context_of(data, i)[0] for i in range(len(data))).most_common(1)[0][0]]
        while len(ids) < first + self.config.length:
            logits = self.known.source.model(input_ids=self._tensor([ids])).logits[0, -1].float()
            logits[list(self.special)] = -torch.inf
            ids.append(int(logits.argmax()))
        return tuple(ids[first:])

    @torch.no_grad()
    def perplexity(self, triggers: Sequence[tuple[int, ...]], data: AttackData) -> list[float]:
        """Of triggers where they stand, under the model; a token without any before it is free."""
        opening = self._opening(data)
        ids = self._tensor([[*opening, *t] for t in triggers])
        if ids.shape[1] < 2:
            return [1.0] * len(triggers)
        logp = self.known.source.model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        said = logp.gather(-1, ids[:, 1:, None])[..., 0][:, max(0, len(opening) - 1) :]
        return [float(x) for x in (-said.mean(1)).exp()]

    def _swaps(self, data: AttackData, trigger: tuple[int, ...], at: int) -> list[tuple[int, ...]]:
        """Candidates for one token, most promising first, none above the perplexity cap."""
        c = self.config
        scores = self._first_order(data, trigger)[at]
        if not bool(torch.isfinite(scores).all()) or not bool(scores.std() > 0):
            scores = self._expected(data, trigger, at)
        scores[[*self.special, trigger[at]]] = torch.inf
        order = scores.argsort()[: len(scores) - len(self.special) - 1].tolist()
        out: list[tuple[int, ...]] = []
        for first in range(0, len(order), 256):
            some = [(*trigger[:at], v, *trigger[at + 1 :]) for v in order[first : first + 256]]
            cost = self.perplexity(some, data)
            out += [t for t, p in zip(some, cost, strict=True) if p <= c.max_perplexity]
            if len(out) >= c.candidates:
                break
        return out[: c.candidates]

    def _first_order(self, data: AttackData, trigger: tuple[int, ...]) -> Tensor:
        """``E_v . dloss/dE_i``, ``[n, V]``; zero where the guard sends a twin."""
        known, table = self.known, embedding_table(self.known.source)
        if known.guard is not None and known.guard.needs_twin:
            return torch.zeros(len(trigger), len(table))
        part = with_message(data.subset(range(min(16, len(data)))), trigger, self.special)
        rows = table[part.context_ids.clamp_min(0).to(table.device)]
        soft = table[list(trigger)].clone().requires_grad_()
        first = [lead(context_of(part, i), self.special) for i in range(len(part))]
        embeds = torch.stack(
            [
                torch.cat((row[:k], soft, row[k + len(trigger) :]))
                for row, k in zip(rows, first, strict=True)
            ]
        )
        valid = (part.context_ids != IGNORE).to(table.device)
        with torch.enable_grad():
            kv = guarded_mean(known.guard, soft_prefill(known.source, embeds, valid), part.mask)
            assert self.reader is not None
            (g,) = torch.autograd.grad(_cross_entropy(self.reader, part.with_kv(kv)), soft)
        return (g @ table.T).detach().float().cpu()

    @torch.no_grad()
    def _expected(self, data: AttackData, trigger: tuple[int, ...], at: int) -> Tensor:
        """Minus the model's log-probability of every token at a place, ``[V]``."""
        before = [*self._opening(data), *trigger[:at]] or [trigger[0]]
        logits = self.known.source.model(input_ids=self._tensor([before])).logits[0, -1]
        unlikely: Tensor = -logits.float().log_softmax(-1).cpu()
        return unlikely

    @torch.no_grad()
    def _loss(self, reader: ProbeAttack, data: AttackData) -> float:
        return float(_cross_entropy(reader, data))

    # -- planting

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(r) for r in rows], device=self.known.source.device)

    def _opening(self, data: AttackData) -> list[int]:
        """What the message stands behind; the same chat format opens every context."""
        context = context_of(data, 0)
        return context[: lead(context, self.special)]

    def with_trigger(self, contexts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Contexts whose sender has read the trigger first."""
        return [insert(c, self.trigger_ids, self.special) for c in contexts]

    def plant(self, data: AttackData) -> AttackData:
        """The victims' segments after they have read the trigger, through the guard.

        Data that is planted already, or whose contexts are unknown, comes back as it is.
        """
        if not self.trigger_ids or data.planted or not len(data):
            return data
        if not all(context_known(data, i) for i in range(len(data))):
            return data
        return self._planted(data, self.trigger_ids, "victim")

    def _planted(self, data: AttackData, trigger: tuple[int, ...], use: str) -> AttackData:
        """Every use has noise of its own, as every segment has."""
        moved = with_message(data, trigger, self.special)
        return publish(moved, self.known, f"{self._salt} {use}")

    def recover(self, data: AttackData) -> list[Guess]:
        """One guess a secret, from planted data; plants it first where that was not done."""
        if self.reader is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        return self.reader.recover(self.plant(data))


def _cross_entropy(reader: ProbeAttack, data: AttackData) -> Tensor:
    """Of the true tokens under the reader, nats a token, differentiable in the KV."""
    assert reader.net is not None
    spots = [
        (i, at, t)
        for i, row in enumerate(data.secrets)
        for s in row
        for at, t in zip(range(*s.positions), s.ids, strict=False)
    ]
    rows, at, true = (torch.tensor(column) for column in zip(*spots, strict=True))
    features = data.kv.features()[rows, at].float()
    return F.cross_entropy(reader.net(features), true.to(features.device))
