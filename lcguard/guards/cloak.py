"""Keyed and reversible: each layer's channels rotated, blocks of tokens out of order.

``z' = P z R_lk`` with R an orthogonal matrix for every layer and K or V and P a permutation of the
segment's whole blocks, both drawn from a 32-byte key; after KV-Cloak (arXiv 2508.09442), from
which we differ in using rotations alone, so that the receiver undoes them to the last rounding.

A bijection hides nothing from who holds the key: this protects the wire. The receiver calls
``unlock`` before use and then has the raw segment. The key is no part of the card or the weights:
give it as option ``key``, in the environment (``LCGUARD_CLOAK_KEY``) or to ``hold``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.noise import KEY_BYTES, WORDS, key_stream
from lcguard.protocols import KVBatch, Mask

VARIABLE = "LCGUARD_CLOAK_KEY"
"""Environment variable with the key in hexadecimal, read where no option gives one."""


@register("cloak")
class CloakGuard(GuardModule):
    trained = False
    locks = True
    by_token = True
    claim = (
        "Hides the segment on the wire from those without the key. Nothing is claimed against the "
        "receiving agent, who holds it and sees everything, nor against one who has seen raw and "
        "cloaked segments side by side: a rotation is solved for from a few."
    )

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        key: str = field(default="", repr=False)
        """32 bytes in hexadecimal; on no card."""
        key_id: str = ""
        """Which key it is, so that another is refused; made from the key where empty."""
        block: int = 0
        """Tokens in a block that changes places; 0 keeps the order."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        if self.config.block < 0:
            raise ValueError(f"block {self.config.block} must be 0 (keep the order) or more tokens")
        channels = shape.kv_heads * shape.head_dim
        # not persistent: the rotations are the key in another form
        self.register_buffer("rotation", torch.empty(0, 2, channels, channels), persistent=False)
        self._key: bytes | None = None
        self._key_id: str = self.config.key_id
        text = self.config.key or os.environ.get(VARIABLE, "")
        if text:
            try:
                key = bytes.fromhex(text)
            except ValueError:  # whose message would show part of the key
                raise ValueError(
                    f"the cloak's key is not hexadecimal: give {KEY_BYTES} bytes so"
                ) from None
            self.hold(key)
        self.config = replace(self.config, key="")

    rotation: Tensor

    def hold(self, key: bytes) -> CloakGuard:
        """Takes the key, after loading. Raises ``ValueError`` for another than this guard's."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"the cloak's key has {len(key)} bytes, {KEY_BYTES} are needed")
        name = hashlib.sha256(b"lcguard cloak id\0" + key).hexdigest()[:16]
        if self._key_id and self._key_id != name:
            raise ValueError(f"this cloak needs key {self._key_id}, the one given is {name}")
        channels = self.rotation.shape[-1]
        made = [
            _orthogonal(_derive(key, f"rotation {layer} {part}"), channels)
            for layer in range(self.shape.layers)
            for part in range(2)
        ]
        self.rotation = torch.stack(made).unflatten(0, (-1, 2)).to(self.center)
        self._key, self._key_id = key, name
        return self

    def options(self) -> dict[str, Any]:
        """All but the key."""
        return {"noise": self.config.noise, "key_id": self._key_id, "block": self.config.block}

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        turned = torch.einsum("btlkc,lkcd->btlkd", z, self._held())
        order = self._order(valid)
        return Rewrite(_reorder(turned, order), torch.zeros(valid.shape, device=z.device))

    def in_tiles(self) -> bool:
        return super().in_tiles() and not self.config.block

    @torch.no_grad()
    def unlock(self, kv: KVBatch) -> KVBatch:
        """What the receiver who holds the key reads: the raw segment, as exact as its dtype."""
        rotation = self._held()
        z = _reorder(self.standardise(kv), self._order(kv.valid).argsort(1))
        return self.restore(torch.einsum("btlkd,lkcd->btlkc", z, rotation), kv)

    def _held(self) -> Tensor:
        if self._key is None:
            which = f" {self._key_id}" if self._key_id else ""
            raise ValueError(f"guard 'cloak' has no key{which}: set {VARIABLE} or call hold(key)")
        return self.rotation

    def _order(self, valid: Tensor) -> Tensor:
        """``[B, T]``: which token stands here. The tokens past the last whole block stay."""
        order = torch.arange(valid.shape[1]).repeat(len(valid), 1)
        block = self.config.block
        for row, n_tokens in zip(order, valid.sum(1).tolist(), strict=True):
            n = n_tokens // block if block else 0
            if n > 1:
                places = torch.from_numpy(self._permutation(n))
                row[: n * block] = row[: n * block].view(n, block)[places].flatten()
        return order.to(valid.device)

    def _permutation(self, n: int) -> np.ndarray:
        assert self._key is not None
        words = key_stream(_derive(self._key, f"order {n}"), 0, -(-n // WORDS)).flatten()
        return np.argsort(words[:n], kind="stable")


def _derive(key: bytes, purpose: str) -> bytes:
    """A key of its own for each use."""
    return hashlib.sha256(b"lcguard cloak\0" + key + purpose.encode()).digest()


def _orthogonal(key: bytes, n: int) -> Tensor:
    """``[n, n]``, uniform: the signs of QR are fixed, or they would depend on the library."""
    words = key_stream(key, 0, -(-n * n // WORDS)).flatten()
    draws = box_muller(words)[: n * n].double().view(n, n)
    q, r = torch.linalg.qr(draws)
    fixed: Tensor = q * r.diagonal().sign()
    return fixed


def box_muller(words: np.ndarray) -> Tensor:
    """Box and Muller on neighbours of an even number of uint32 words; no noise is made of it."""
    u = torch.from_numpy((words >> np.uint32(8)).astype(np.float32)) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u[0::2] + 2.0**-24))
    angle = u[1::2] * (2.0 * torch.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()


def _reorder(z: Tensor, order: Tensor) -> Tensor:
    """``z [B, T, ...]`` with token ``order[b, t]`` at place t."""
    return z[torch.arange(len(z), device=z.device)[:, None], order]
