"""Screening without a backward pass: input gradients predicted from forward features.

The attacker rebuilds the sender's input as soft tokens e, by descent on

    loss(e) = 1/2 sum_t ||r_t||^2,   r = (g(KV(e)) - observed) / std,

and names the nearest row of the embedding table at each secret's position. ``true`` takes the
gradient by autograd through the model and the guard g; ``predicted`` takes ``W r_t`` instead, with
W a ridge regression of true gradients on the features r_t of the same position, fitted along
descents on the attacker's own segments. After arXiv 2605.14868, which predicts the gradient of a
classifier's input from its hidden states; only the direction counts, since steps are normalised.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.soft import embedding_table, first_layers, guarded_mean, soft_prefill
from lcguard.protocols import AttackData, Guess, KVBatch, Mask

MODES = ("predicted", "true")
_SHARPNESS = 20.0
"""Of the softmax over cosines to the embedding table, for cross-entropy alone."""


@register("gradient_prediction")
class GradientPredictionAttack(BaseAttack):
    goal = "rebuild the sender's tokens by descent along predicted gradients, forward passes only"
    reference = "arXiv 2605.14868"

    @dataclass(frozen=True)
    class Config:
        mode: Literal["predicted", "true"] = "predicted"
        steps: int = 60
        """Descent steps."""
        lr: float = 0.25
        """First step, in units of the embeddings' root mean square; falls to 2% of it."""
        records: int = 64
        """Own segments that the gradient is learned on."""
        fit_steps: int = 12
        """Descent steps on them; 0 learns nothing (for ``true``)."""
        ridge: float = 1e-3
        batch: int = 32
        """Segments side by side."""
        layers: int = 0
        """So many first layers are run and compared; 0: all, which a guard needs."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        c = self.config
        if c.mode not in MODES:
            raise ValueError(f"mode {c.mode!r} is unknown; known: {', '.join(MODES)}")
        if c.steps < 1 or c.fit_steps < 0 or (c.mode == "predicted" and not c.fit_steps):
            raise ValueError(
                f"steps={c.steps} must be 1 or more and fit_steps={c.fit_steps} 0 or more; "
                "mode 'predicted' learns from 1 or more"
            )
        self.scale: Tensor | None = None
        self.weights: Tensor | None = None
        """W ``[F, d]``; None in mode ``true`` without fit steps."""

    # -- fitting

    def fit(self, pairs: AttackData, *, seed: int = 0) -> GradientPredictionAttack:
        """Learns W from own segments alone. Raises ``ValueError`` where they hold no secret."""
        if not any(pairs.secrets):
            raise ValueError("no secret in the training pairs: nothing is forbidden on these edges")
        c = self.config
        order = list(range(len(pairs)))
        random.Random(seed).shuffle(order)
        if c.layers and self.known.guard is not None:
            raise ValueError(f"layers={c.layers}: a guard rewrites all layers, so give 0")
        own = self._cut(pairs.subset(order[: c.records]))
        seen = own.kv.features()[own.kv.valid].float()
        # a guard may send constants: no information, so no weight
        std = seen.std(0)
        self.scale = torch.where(std > 1e-4, 1 / std.clamp_min(1e-4), 0.0)
        gram = cross = torch.zeros(0)
        for part in self._parts(own) if c.fit_steps else ():
            for _, r, g, valid in self._descend(part.kv, part.mask, "true", c.fit_steps):
                x, y = r[valid].double(), g[valid].double()
                # both in units of the residual: late steps count as much as early ones
                size = x.norm(dim=-1, keepdim=True).clamp_min(1e-9)
                x, y = x / size, y / size
                one, two = x.T @ x, x.T @ y
                gram, cross = (gram + one, cross + two) if len(gram) else (one, two)
        if len(gram):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            ridge = c.ridge * gram.diagonal().mean()
            self.weights = torch.linalg.solve(gram + ridge * eye, cross).to(self.known.source.dtype)
        return self

    def _cut(self, data: AttackData) -> AttackData:
        """With the KV of the layers that are compared."""
        n = self.config.layers or None
        kv = data.kv
        return data.with_kv(KVBatch(kv.keys[:, :n], kv.values[:, :n], kv.valid))

    def _parts(self, data: AttackData) -> Iterator[AttackData]:
        for first in range(0, len(data), self.config.batch):
            yield data.subset(range(first, min(first + self.config.batch, len(data))))

    # -- descent

    def _start(self, kv: KVBatch) -> Tensor:
        """The same for every token: the mean row of the embedding table, at the rows' size."""
        table = embedding_table(self.known.source)
        mean = F.normalize(table.mean(0), dim=0) * table.norm(dim=1).mean()
        start: Tensor = mean.expand(*kv.valid.shape, -1)
        return start

    def residual(self, embeds: Tensor, observed: KVBatch, mask: Mask) -> Tensor:
        """``r [B, T, F]``, 0 at padding."""
        if self.scale is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        source = self.known.source
        kv = soft_prefill(source, embeds, observed.valid, first_layers(source, self.config.layers))
        kv = guarded_mean(self.known.guard, kv, mask)
        r = (kv.features() - observed.features()).float() * self.scale
        return r * observed.valid[..., None]

    def true_gradient(self, embeds: Tensor, observed: KVBatch, mask: Mask) -> tuple[Tensor, Tensor]:
        """Residual and gradient ``[B, T, d]`` by autograd."""
        embeds = embeds.detach().requires_grad_()
        with torch.enable_grad():
            r = self.residual(embeds, observed, mask)
            (g,) = torch.autograd.grad(r.square().sum() / 2, embeds)
        return r.detach(), g

    @torch.no_grad()
    def predicted_gradient(
        self, embeds: Tensor, observed: KVBatch, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """Residual and ``W r``: one forward pass, no graph."""
        if self.weights is None:
            raise ValueError(f"attack {self.name!r} has learned no gradient: give fit_steps")
        r = self.residual(embeds, observed, mask)
        return r, r.to(self.weights.dtype) @ self.weights

    def _descend(
        self, kv: KVBatch, mask: Mask, mode: str, steps: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Embeddings, residual, gradient and validity before each step, and after the last."""
        kv = kv.trim()
        embeds = self._start(kv)
        size = embedding_table(self.known.source).square().mean().sqrt()
        gradient = self.true_gradient if mode == "true" else self.predicted_gradient
        for step in range(steps):
            r, g = gradient(embeds, kv, mask)
            yield embeds, r, g, kv.valid
            lr = self.config.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            rms = g.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)
            embeds = (embeds - lr * size * g / rms).detach()
        self._last = embeds

    # -- attacking

    def soft_tokens(self, data: AttackData) -> list[Tensor]:
        """``[T_i, d]`` for each record: where the descent ends."""
        out = []
        for part in self._parts(self._cut(data)):
            for _ in self._descend(part.kv, part.mask, self.config.mode, self.config.steps):
                pass
            out += list(self._last.detach())
        return out

    @torch.no_grad()
    def recover(self, data: AttackData) -> list[Guess]:
        """One guess a secret; raises ``ValueError`` if not fitted."""
        if self.scale is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        table = F.normalize(embedding_table(self.known.source).float(), dim=1)
        out = []
        for record, secrets, soft in zip(
            data.record_ids, data.secrets, self.soft_tokens(data), strict=True
        ):
            for s in secrets:
                here = soft[s.positions[0] : s.positions[1]].float()
                name = record, s.category, s.field
                if len(here) < len(s.ids):  # the guard moved the tokens: nothing to read
                    out.append(Guess(*name, (), None, 0.0))
                    continue
                logp = (_SHARPNESS * F.normalize(here, dim=1) @ table.T).log_softmax(1)
                guess, true = logp.argmax(1), torch.tensor(s.ids, device=logp.device)
                nll = -float(logp.gather(1, true[:, None]).sum())
                hits = float((guess == true).float().mean())
                out.append(Guess(*name, tuple(guess.tolist()), nll, hits))
        return out

    def gradient_cosine(self, data: AttackData) -> float:
        """Mean cosine of predicted and true gradients over the tokens and steps of a descent."""
        total, count = 0.0, 0
        for part in self._parts(self._cut(data)):
            kv = part.kv.trim()
            for embeds, _, g, valid in self._descend(
                part.kv, part.mask, "predicted", self.config.steps
            ):
                _, true = self.true_gradient(embeds, kv, part.mask)
                cosine = F.cosine_similarity(g[valid].float(), true[valid].float(), dim=-1)
                total, count = total + float(cosine.sum()), count + len(cosine)
        return total / count
