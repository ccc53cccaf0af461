"""Gauss-Newton inversion: soft embeddings whose guarded segment is the one observed.

    min_e ||g(KV(e_1 .. e_T)) - y||^2,    (J^T J + lambda I) step = J^T (y - g(KV(e))),

from the mean embedding, all tokens at once, through the guard and the model. J is never formed:
conjugate gradients need J v and J^T u alone. Each iterate is snapped to the tokens whose embeddings
point the same way; the text that explains the segment best is kept, and one that explains it to
rounding ends the search. Of a guard with noise, g is the mean. The idea is that of inverting a
bijection in a few Gauss-Newton steps (arXiv 2605.13470): a bijective guard is an encoding, not an
erasure.

A step costs ``iterations`` forward and backward passes over a record. Records beyond
``max_records`` or longer than ``max_tokens`` are not attempted: they get no guesses and are in no
score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from lcguard.attacks.base import BaseAttack, register
from lcguard.attacks.foresight import Foresight
from lcguard.attacks.inversion import guesses
from lcguard.cache import cache_to_kv, kv_to_cache
from lcguard.protocols import AttackData, Guess, KVBatch, Mask
from lcguard.records import IGNORE

Map = Callable[[Tensor], Tensor]


@register("gauss_newton")
class GaussNewtonAttack(BaseAttack):
    goal = "solve for the embeddings whose guarded segment is the one observed"
    reference = "after arXiv 2605.13470, through the guard and the model"
    fitted: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        steps: int = 8
        iterations: int = 40
        """Of conjugate gradients, at most, in a step."""
        damping: float = 1e-3
        """First lambda, in units of the curvature along the gradient."""
        max_records: int | None = 16
        max_tokens: int | None = None

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self._foresight: Foresight | None = None
        self.steps_done = 0
        """Steps that the last segment took."""
        self.misfit = float("inf")
        """Share of the last segment that its text leaves unexplained, in 0..1 and worse."""

    @torch.no_grad()
    def fit(self, pairs: AttackData, *, seed: int = 0) -> GaussNewtonAttack:
        """Fits nothing but the scale of raw channels, from contexts of the attacker's own.

        Raises ``ValueError`` for options that cannot be, or a guard that shows no weights.
        """
        source, c = self.known.source, self.config
        for name in ("steps", "iterations"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} {getattr(c, name)} must be at least 1")
        if not c.damping > 0:
            raise ValueError(f"damping {c.damping} must be positive")
        table = source.model.get_input_embeddings()
        n = table.weight.shape[0]
        # through the module: some families scale their embeddings there
        self._rows = table(torch.arange(n, device=source.device)).float()
        own = [[t for t in row if t != IGNORE] for row in pairs.context_ids.tolist()]
        contexts = [row for row in own if row][:64]
        if not contexts:  # a blind floor's pairs
            generator = torch.Generator().manual_seed(seed)
            contexts = torch.randint(n, (16, 16), generator=generator).tolist()
        raw = source.prefill(contexts)
        self._foresight = Foresight(self.known.guard, raw, undo=False)
        return self

    def read(self, kv: KVBatch, mask: Mask, on: KVBatch | None = None) -> tuple[int, ...]:
        """The tokens of one segment (B = 1); ``on`` as in ``collision``.

        Raises ``ValueError`` if not fitted.
        """
        if self._foresight is None:
            raise ValueError(f"attack {self.name!r} is not fitted; call fit first")
        c, kv = self.config, kv.trim()
        send = self._sender(mask, on)
        with sdpa_kernel(SDPBackend.MATH):  # the kernel that has every derivative
            with torch.no_grad():
                y = self._foresight.observed(kv, mask)
            unit = self._rows.std()
            soft = self._rows.mean(0).expand(y.shape[0], -1) / unit
            damping, energy = c.damping, float(y.square().sum())
            best: tuple[int, ...] = ()
            self.misfit = float("inf")
            for self.steps_done in range(1, c.steps + 1):
                soft, damping = _step(lambda e: send(e * unit), soft, y, damping, c.iterations)
                ids = self._snap(soft)
                with torch.no_grad():
                    left = float((send(self._rows[ids]) - y).square().sum()) / max(energy, 1e-9)
                if not best or left < self.misfit:
                    best, self.misfit = tuple(ids.tolist()), left
                if self.misfit < 1e-8:  # to rounding
                    break
        return best

    def recover(self, data: AttackData) -> list[Guess]:
        """Guesses for the attempted records only; raises ``ValueError`` if not fitted."""
        c, on = self.config, data.on
        lengths = data.kv.valid.sum(1).tolist()
        chosen = [
            i
            for i, n in enumerate(lengths)
            if data.secrets[i] and (c.max_tokens is None or n <= c.max_tokens)
        ][: c.max_records]
        found = [
            self.read(data.kv[[i]], data.mask[[i]], None if on is None else on[[i]]) for i in chosen
        ]
        return guesses(data, chosen, found)

    def _sender(self, mask: Mask, on: KVBatch | None) -> Map:
        """Embeddings ``[T, d]`` to the mean of what crosses the hop."""
        source, foresight = self.known.source, self._foresight
        assert foresight is not None
        behind = None if on is None else on.trim()
        n = 0 if behind is None else behind.valid.shape[1]

        def send(embeddings: Tensor) -> Tensor:
            cache: Any = DynamicCache(config=None)
            if behind is not None:
                cache = kv_to_cache(
                    behind, source.rotary, source.config, suffix_tokens=len(embeddings)
                )
            source.model.base_model(
                inputs_embeds=embeddings[None].to(source.dtype),
                past_key_values=cache,
                use_cache=True,
            )
            return foresight.segment(cache_to_kv(cache, source.rotary, start=n), mask)

        return send

    def _snap(self, soft: Tensor) -> Tensor:
        """Tokens ``[T]`` of the embeddings nearest in direction: the first norm drops lengths."""
        rows = torch.nn.functional.normalize(self._rows, dim=1)
        return (soft @ rows.T).argmax(1)


def _step(f: Map, x: Tensor, y: Tensor, damping: float, iterations: int) -> tuple[Tensor, float]:
    """One damped step and the next damping, in units of the curvature along the gradient."""
    out, pull = vjp(f, x)  # type: ignore[misc]
    residual = y - out
    (gradient,) = pull(residual)
    loss = float(residual.square().sum())

    def curved(v: Tensor) -> Tensor:
        image: Tensor = pull(jvp(f, (x,), (v,))[1])[0]
        return image

    norm = gradient.square().sum()
    if float(norm) <= 1e-20:
        return x, damping
    scale = float((gradient * curved(gradient)).sum() / norm)
    step = _solve(lambda v: curved(v) + damping * scale * v, gradient, iterations)
    for share in (1.0, 0.5, 0.25, 0.1):
        tried = (x + share * step).detach()
        with torch.no_grad():
            after = float((y - f(tried)).square().sum())
        if after < loss:
            return tried, damping * (0.3 if share == 1.0 else 2.0)
    return x, damping * 10  # no descent: nearer to the gradient next time


def _solve(a: Map, b: Tensor, iterations: int, tolerance: float = 1e-3) -> Tensor:
    """Conjugate gradients on ``a(x) = b``, to a residual of ``tolerance``."""
    x, left = torch.zeros_like(b), b.clone()
    direction, size = left.clone(), float(left.square().sum())
    goal = tolerance**2 * size
    for _ in range(iterations):
        image = a(direction)
        along = size / max(float((direction * image).sum()), 1e-30)
        x, left = x + along * direction, left - along * image
        new = float(left.square().sum())
        if new <= goal:
            break
        direction, size = left + new / size * direction, new
    return x
