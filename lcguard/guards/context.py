"""The small bidirectional network with which a guard reads a whole segment.

Un-rotated KV holds no positions, so its attention rotates by token index: a value that stands
before its label ("... was entered as SSN") is recognised from what follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.base import KVShape


def rotate_half(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, heads, T, D]`` at ``positions [T]``, base 1,000."""
    half = x.shape[-1] // 2
    rate = 1000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """Pre-norm self-attention over all tokens and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """``valid``: ``[B, T]``, or ``[B, T, T]`` which tokens each one sees."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(x.shape[1], device=x.device)
        if valid.ndim == 2:
            valid = valid[:, None].expand(-1, x.shape[1], -1)
        out = F.scaled_dot_product_attention(
            rotate_half(q, positions), rotate_half(k, positions), v, attn_mask=valid[:, None]
        )
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ContextNetwork(nn.Module):
    """``z [B, T, L, 2, H * D]`` and a policy vector ``[B, 2C]`` to hidden states ``[B, T, d]``.

    ``n_categories`` 0 makes a network that does not read the policy.
    """

    def __init__(self, shape: KVShape, n_categories: int, width: int, blocks: int) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"width {width} must be a multiple of 32, the size of a head")
        self.read = nn.Linear(shape.channels, width)
        self.policy = nn.Linear(2 * n_categories, width) if n_categories else None
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, valid: Tensor, policy: Tensor | None = None) -> Tensor:
        flat = z.flatten(2)
        x = self.read(F.layer_norm(flat, flat.shape[-1:]))
        if self.policy is not None and policy is not None:
            x = x + self.policy(policy.to(z.device))[:, None]
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)  # type: ignore[no-any-return]
