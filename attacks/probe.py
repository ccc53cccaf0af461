"""Per-position probes: which token stood here, read off the guarded entry at that position.

The positions of the secrets are known to this attacker (a template, a form), so the length of
every secret is too. A two-layer head on all layers' keys and values of one token; no context.

A vocabulary of tens of thousands is not learned from some thousand tokens: the words of a value are
mostly new. ``tied`` starts from what the attacker knows, the model: a token is named by the nearest
of the entries that its tokens make alone in the first layer read, as by ``inversion``, and what is
learned is how a guard moved them and what the other layers add.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.attacks.base import FitConfig, ScheduledAttack, register
from lcguard.attacks.decoder import aligned
from lcguard.attacks.inversion import vocabulary_rows
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.records import IGNORE


@register("probe")
class ProbeAttack(ScheduledAttack):
    goal = "read each forbidden token off the guarded entry at its own position"
    reference = "standard probing; positions known"

    @dataclass(frozen=True)
    class Config(ScheduledAttack.Config):
        width: int = 192
        layers: tuple[int, ...] = ()
        """Only these layers' keys and values; empty: all."""
        tied: bool = False
        """Name tokens by the entries that each makes alone in the first of ``layers``: a large
        vocabulary, of which the training pairs hold a part, is read like the rest."""
        negatives: int = 0
        """With ``tied``: so many random tokens, and those of the batch, are what a training step
        chooses from; 0: the whole vocabulary."""
        fit: FitConfig = field(
            default_factory=lambda: FitConfig(steps=300, batch=2048), kw_only=True
        )
        """``batch`` counts tokens here."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        if self.config.negatives and not self.config.tied:
            raise ValueError(f"negatives={self.config.negatives} is for tied: true")
        self.net: nn.Sequential | None = None
        self.fields: dict[str, int] = {}

    # -- in the training loop of a guard

    def as_adversary(self) -> ProbeAttack:
        return self

    @property
    def network(self) -> nn.Module:
        if self.net is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        return self.net

    def start(self, pairs: AttackData, *, seed: int = 0) -> None:
        """Makes the network without training it. Raises ``ValueError`` as ``fit``."""
        torch.manual_seed(seed)
        x, _, secret = _positions(pairs, self.config.layers)
        if not bool(secret.any()):
            raise ValueError("no secret position in the training pairs: nothing to probe")
        names = {s.field for secrets in pairs.secrets for s in secrets}
        self.fields = {name: i for i, name in enumerate(sorted(names))}
        self.net = self._made(x, pairs.special.vocab)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        learnt = [p for p in self.network.parameters() if p.requires_grad]
        return [torch.optim.AdamW(learnt, lr=self.config.fit.lr)]

    def update(self, batch: AttackData, optimizers: Sequence[torch.optim.Optimizer]) -> float:
        """One step on already guarded pairs; returns the loss in nats."""
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    def loss(self, batch: AttackData, *, auxiliary: bool = True) -> Tensor:
        """Cross-entropy of the secrets' tokens in nats, differentiable in the KV; ``auxiliary``:
        half of it that of the tokens beside them."""
        x, y, secret = _positions(batch, self.config.layers)
        kinds = [secret, ~secret] if auxiliary else [secret]
        found = [F.cross_entropy(self.network(x[k]), y[k]) for k in kinds if bool(k.any())]
        return sum(found, x.sum() * 0.0) / max(1, len(found))

    def log_probs(self, batch: AttackData) -> tuple[Tensor, Tensor, Tensor]:
        """Fields ``[N]``, labels ``[N, K]`` and log-probabilities ``[N, K, V]``, differentiable."""
        seen, rows = features(batch.kv, self.config.layers).float(), []
        labels, fields = [], []
        for i, secrets in enumerate(batch.secrets):
            for s in secrets:
                here = seen[i, s.positions[0] : s.positions[1]]
                if len(here) == len(s.ids):  # else the guard moved the tokens
                    rows.append(here)
                    labels.append(torch.tensor(s.ids, device=seen.device))
                    fields.append(self.fields.get(s.field, len(self.fields)))
        if not rows:
            nothing = torch.zeros(0, 1, dtype=torch.long, device=seen.device)
            return nothing[:, 0], nothing, self.network(seen[:0, :1]).log_softmax(-1)
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        due = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        at = torch.tensor(fields, device=seen.device)
        return at, due, self.network(x).log_softmax(-1)

    # -- afterwards

    def fit(self, pairs: AttackData, *, seed: int = 0) -> ProbeAttack:
        """Raises ``ValueError`` where the pairs hold no secret whose position is known."""
        torch.manual_seed(seed)
        x, y, secret = _positions(pairs, self.config.layers)
        if not bool(secret.any()):
            raise ValueError("no secret position in the training pairs: nothing to probe")
        c = self.config
        self.net = self._made(x, pairs.special.vocab)
        learnt = [p for p in self.net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=c.fit.lr)
        rng = torch.Generator().manual_seed(seed)
        inside, outside = secret.nonzero()[:, 0], (~secret).nonzero()[:, 0]
        half = max(1, c.fit.batch // 2)
        for step in range(c.fit.steps):
            for group in optimizer.param_groups:
                group["lr"] = c.fit.lr * c.fit.rate(step)
            # half of each batch is secret positions, or the frequent filler would crowd them out
            rows = torch.cat(
                [
                    p[torch.randint(len(p), (half,), generator=rng)]
                    for p in (inside, outside)
                    if len(p)
                ]
            )
            loss = self._step_loss(x[rows], y[rows], rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return self

    def _step_loss(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """Cross-entropy in nats, over the vocabulary or some of it."""
        assert self.net is not None
        if not self.config.negatives:
            return F.cross_entropy(self.net(x), y)
        names = self.net[-1]
        assert isinstance(names, _Nearest)
        drawn = torch.randint(len(names.rows), (self.config.negatives,), generator=rng)
        among = torch.cat((y, drawn.to(y.device))).unique()
        logits = names(self.net[:-1](x), among)
        return F.cross_entropy(logits, torch.searchsorted(among, y))

    def _made(self, x: Tensor, vocab: int) -> nn.Sequential:
        """The untrained network for features like ``x [N, F]``."""
        center, scale = x.detach().mean(0), x.detach().std(0).clamp_min(1e-4)
        standard, width = _Standardise(center, scale), self.config.width
        if not self.config.tied:
            head = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, vocab))
            return nn.Sequential(standard, *head).to(x.device)
        layer = self.config.layers[0] if self.config.layers else 0
        rows = vocabulary_rows(self.known.source, layer).kv[:vocab].to(x.device)
        own = rows.shape[1]  # the first layer's entries are the first features
        rows = (rows - center[:own]) / scale[:own]
        return nn.Sequential(standard, _Moved(x.shape[1], width, own), _Nearest(rows)).to(x.device)

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """One guess a secret; raises ``ValueError`` if not fitted."""
        if self.net is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        seen, out = features(data.kv, self.config.layers).float(), []
        for i, (record, secrets) in enumerate(zip(data.record_ids, data.secrets, strict=True)):
            for s in secrets:
                start, end = s.positions
                true = torch.tensor(s.ids, device=seen.device)
                here = seen[i, start:end]
                if len(here) < len(s.ids):  # the guard moved the tokens: nothing to read
                    out.append(Guess(record, s.category, s.field, (), None, 0.0))
                    continue
                logp = self.net(here).log_softmax(-1)
                guess = logp.argmax(-1)
                nll = -logp.gather(1, true[:, None]).sum()
                out.append(
                    Guess(
                        record,
                        s.category,
                        s.field,
                        tuple(guess.tolist()),
                        float(nll),
                        float((guess == true).float().mean()),
                    )
                )
        return out


class _Standardise(nn.Module):
    def __init__(self, center: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)

    center: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.center) / self.scale


class _Moved(nn.Module):
    """Features ``[N, F]`` to the first ``own`` of them as they were without a guard; starts as if
    there was none."""

    def __init__(self, channels: int, width: int, own: int) -> None:
        super().__init__()
        self.skip = nn.Linear(channels, own)
        self.more = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, own))
        nn.init.eye_(self.skip.weight)
        last = self.more[-1]
        assert isinstance(last, nn.Linear)
        for zero in (self.skip.bias, last.weight, last.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.skip(x) + self.more(x)
        return moved


class _Nearest(nn.Module):
    """Entries ``[N, E]`` to logits: minus the squared distance to each token's row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("offset", rows.square().sum(1) / 2)
        # a tenth: between two tokens lie some nats a channel, and all of them would saturate
        self.log_rate = nn.Parameter(torch.tensor(0.1).log())

    rows: Tensor
    offset: Tensor

    def forward(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """Of the tokens ``among [K]``, or of all."""
        rows, offset = (
            (self.rows, self.offset) if among is None else (self.rows[among], self.offset[among])
        )
        return (x @ rows.T - offset) * self.log_rate.exp()


def features(kv: KVBatch, layers: Sequence[int]) -> Tensor:
    """``[B, T, F]``: the chosen layers' keys and values of a token side by side, or all."""
    if not layers:
        return kv.features()
    n = kv.keys.shape[1]
    for layer in layers:
        if not 0 <= layer < n:
            raise ValueError(f"layers={list(layers)}: the model has {n}, so give 0 to {n - 1}")
    chosen = list(layers)
    return KVBatch(kv.keys[:, chosen], kv.values[:, chosen], kv.valid).features()


def _positions(pairs: AttackData, layers: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, F]``, tokens ``[N]`` and whether a position is a secret's, of all tokens."""
    n = pairs.kv.valid.shape[1]
    ids = aligned(pairs.context_ids, n).clone()
    valid = pairs.kv.valid.cpu()
    secret = torch.zeros_like(valid)
    for i, secrets in enumerate(pairs.secrets):
        for s in secrets:
            start, end = s.positions[0], min(s.positions[1], n)
            secret[i, start:end] = True
            # the secrets are known even where the rest of the context is not (a blind floor)
            ids[i, start:end] = torch.tensor(s.ids[: max(0, end - start)], dtype=torch.long)
    known = valid & (ids != IGNORE)
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    rows = torch.tensor(order[:1024])  # enough tokens to learn from, little enough to hold
    known_rows = known[rows]
    x = features(pairs.kv[rows], layers).float()[known_rows]
    return x, ids[rows][known_rows].to(x.device), secret[rows][known_rows]
