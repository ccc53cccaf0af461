"""Segments as soft prompts: a small map turns each guarded entry into an embedding, and the frozen
model reads these in the place of the text's.

    e_t = A z_t + b + f(z_t),    answer = model(e_1 .. e_T, question),

z_t the keys and values of the first layer and a few others at position t. A is first solved by
ridge regression, of the first layer on the whole vocabulary, whose entries there are functions of
the token alone, and for what that leaves on the attacker's own segments; then everything is trained
on the answers. After the soft-prompt inversion of arXiv 2511.19569; the model is not tuned
(``tuned_receiver`` is).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.attacks.asking import AskingAttack
from lcguard.attacks.base import FitConfig, ScheduledAttack, register
from lcguard.attacks.decoder import aligned
from lcguard.attacks.inversion import vocabulary_rows
from lcguard.attacks.probe import features
from lcguard.attacks.soft import embedding_table, soft_prefill
from lcguard.guards.detector import evenly_spaced
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import IGNORE
from lcguard.source import ModelSource
from lcguard.training.descent import Descent

SOLVED_TOKENS = 20_000
"""Tokens that the first map is solved on: many more than it has inputs."""


@register("soft_prefix")
class SoftPrefixAttack(AskingAttack):
    goal = "turn guarded entries into soft prompts of the model, which then says forbidden values"
    reference = "arXiv 2511.19569"

    @dataclass(frozen=True)
    class Config(ScheduledAttack.Config):
        layers: tuple[int, ...] = ()
        """Whose keys and values are read beside the first's; empty: four, evenly spaced."""
        width: int = 256
        questions: int = 4
        """About one record in a step, at most."""
        max_tokens: int = 40
        fit: FitConfig = field(
            default_factory=lambda: FitConfig(steps=80, batch=8, lr=1e-4, warmup=8), kw_only=True
        )

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._map: SoftMap | None = None

    def fit(self, pairs: AttackData, *, seed: int = 0) -> SoftPrefixAttack:
        """Raises ``ValueError`` where the pairs hold no secret, or none is asked about."""
        torch.manual_seed(seed)
        c, source, rng = self.config, self.known.source, random.Random(f"soft/{seed}")
        n = source.shape[0]
        self._layers = tuple(sorted({0, *(c.layers or evenly_spaced(n, min(4, n)))}))
        x = features(pairs.kv, self._layers).float()
        ids = aligned(pairs.context_ids, x.shape[1]).to(x.device)
        table = embedding_table(source).detach()
        made = SoftMap(x[pairs.kv.valid], table.shape[1], c.width)
        first = vocabulary_rows(source).kv
        made.solve(first, table[: len(first)].float())
        known = pairs.kv.valid & (ids != IGNORE)
        made.solve(x[known][:SOLVED_TOKENS], table[ids[known][:SOLVED_TOKENS]].float(), 1e-2)
        self._map = made
        descent = Descent(made.parameters(), c.fit.steps, c.fit.lr, c.fit.warmup)
        with torch.enable_grad():
            for step in range(c.fit.steps):
                kv, packed = self.draw(pairs, rng)
                due = packed.labels[packed.labels != IGNORE].to(source.device)
                logits = source.answer_logits(self.read_as(kv), packed).float()
                descent.down(step, F.cross_entropy(logits, due))
        return self

    def answerer(self) -> ModelSource:
        if self._map is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        return self.known.source

    def read_as(self, kv: KVBatch) -> KVBatch:
        """KV of the soft prompts ``[B, T, d]``; differentiable in the map."""
        assert self._map is not None
        source = self.known.source
        soft = self._map(features(kv, self._layers).float())
        return soft_prefill(source, soft.to(source.dtype), kv.valid)


class SoftMap(nn.Module):
    """Entries ``[..., F]`` to embeddings ``[..., d]``: a linear map, and what it misses."""

    def __init__(self, x: Tensor, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("center", x.mean(0))
        self.register_buffer("scale", x.std(0).clamp_min(1e-4))
        self.linear = nn.Linear(x.shape[1], size)
        self.rest = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, size))
        for zero in (self.linear.weight, self.linear.bias, *self.rest[2].parameters()):
            nn.init.zeros_(zero)
        self.to(x.device)

    center: Tensor
    scale: Tensor

    @torch.no_grad()
    def solve(self, x: Tensor, y: Tensor, ridge: float = 1e-4) -> None:
        """Adds to the linear map what it leaves of ``y [N, d]``, by ridge regression on the first
        of the inputs, ``x [N, F' <= F]``; nothing without tokens."""
        if not len(x):
            return
        n = x.shape[1]
        z = ((x - self.center[:n]) / self.scale[:n]).double()
        a = self.linear.weight[:, :n].double()
        left = y.double() - z @ a.T - self.linear.bias.double()
        mean, middle = left.mean(0), z.mean(0)
        z = z - middle
        gram = z.T @ z
        gram.diagonal().add_(ridge * len(z))
        more = torch.linalg.solve(gram, z.T @ (left - mean)).T
        self.linear.weight[:, :n].add_(more.float())
        self.linear.bias.add_((mean - more @ middle).float())

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.center) / self.scale
        out: Tensor = self.linear(z) + self.rest(z)
        return out
