"""The decoder attack's network: reads a whole segment, writes secrets token by token.

Reader: standardised KV of all layers -> linear -> bidirectional blocks; a head predicts which token
stood at each position. Writer: (field, previous tokens) -> causal self-attention -> attention over
the reader's states. Its output mixes a vocabulary head with a pointer that copies what the reader
recovered, so that one good inversion of single tokens is enough to quote a secret.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.context import Block, rotate_half


class Read(NamedTuple):
    states: Tensor
    """``[B, T, d]``."""
    tokens: Tensor
    """Logits ``[B, T, V]`` over the token at each position."""


class Reader(nn.Module):
    def __init__(self, channels: int, vocab: int, width: int, blocks: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.read = nn.Linear(channels, width)
        self.wide = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                  nn.Linear(2 * width, width))  # fmt: skip
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)

    center: Tensor
    scale: Tensor

    @torch.no_grad()
    def fit_statistics(self, features: Tensor) -> None:
        """``[N, channels]`` of valid tokens."""
        self.center.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp_min(1e-4))

    def forward(self, features: Tensor, valid: Tensor) -> Read:
        x = self.read((features - self.center) / self.scale)
        token = x + self.wide(x)  # which token: from its own position alone
        x = token
        for block in self.blocks:
            x = block(x, valid)
        return Read(self.norm(x), self.head(token))


class Writer(nn.Module):
    def __init__(self, n_fields: int, vocab: int, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.field = nn.Embedding(n_fields, width)
        self.token = nn.Embedding(vocab + 1, width)  # the last entry starts a secret
        self.causal = Block(width, self.heads)
        self.norm = nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.point_q, self.point_k = nn.Linear(width, width), nn.Linear(width, width)
        self.mix = nn.Linear(width, 1)
        self.head = nn.Linear(width, vocab)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))  # fmt: skip

    def forward(self, read: Read, rows: Tensor, valid: Tensor, field: Tensor, prefix: Tensor) -> Tensor:
        """Log-probabilities ``[N, K, V]`` of the next token after each prefix.

        ``rows [N]`` says which record each of the N secrets belongs to; ``prefix [N, K]`` are the
        tokens before, starting with the start token.
        """
        x = self.token(prefix) + self.field(field)[:, None]
        x = _causal(self.causal, x)
        states, seen = read.states[rows], valid[rows][:, None, None, :]
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        score = self.point_q(x) @ self.point_k(states).transpose(1, 2) * x.shape[-1] ** -0.5
        point = score.masked_fill(~valid[rows][:, None], -torch.inf).softmax(-1)
        copy = point @ read.tokens.softmax(-1)[rows]
        share = self.mix(x).sigmoid()
        own = self.head(x).softmax(-1)
        mixed: Tensor = share * copy + (1 - share) * own
        return mixed.clamp_min(1e-9).log()


def _causal(block: Block, x: Tensor) -> Tensor:
    """The block with a causal mask instead of a padding mask."""
    q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    at = torch.arange(x.shape[1], device=x.device)
    out = F.scaled_dot_product_attention(
        rotate_half(q, at), rotate_half(k, at), v, is_causal=True
    )
    x = x + block.out(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


class Network(nn.Module):
    """Reader and writer together."""

    def __init__(self, channels: int, vocab: int, n_fields: int, width: int, blocks: int) -> None:
        super().__init__()
        self.reader = Reader(channels, vocab, width, blocks)
        self.writer = Writer(n_fields, vocab, width)
