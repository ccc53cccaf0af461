"""The decoder attack's network: reads a whole segment, writes secrets token by token.

Reader: standardised KV of all layers -> linear -> which token each position holds (``tokens``),
then bidirectional blocks -> what it belongs to (``states``). Writer: (field, previous tokens) ->
causal self-attention -> attention over the states; a pointer fetches the token that stands where it
looks. One head turns fetched and read-off tokens into words of the vocabulary, so a single good
inversion of single tokens is enough to quote a secret.
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
    """``[B, T, d]``: what ``Network.head`` turns into the token at each position."""


class Reader(nn.Module):
    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.read = nn.Linear(channels, width)
        self.wide = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

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
        return Read(self.norm(x), token)


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
        self.own = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, read: Read, rows: Tensor, valid: Tensor, field: Tensor, prefix: Tensor
    ) -> Tensor:
        """``[N, K, d]`` for the head: the next token after each prefix.

        ``rows [N]`` says which record each of the N secrets belongs to; ``prefix [N, K]`` are the
        tokens before, starting with the start token.
        """
        x = _causal(self.causal, self.token(prefix) + self.field(field)[:, None])
        if not len(rows):  # a batch in which nothing is secret
            return x
        # all secrets of a record side by side: its states are attended to once, not copied per
        # secret
        slot = _slots(rows)
        n, steps = read.states.shape[0], prefix.shape[1]
        grid = x.new_zeros(n, int(slot.max()) + 1, steps, x.shape[-1])
        x = grid.index_put((rows, slot), x).flatten(1, 2)  # [B, S * K, d]
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(read.states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = valid[:, None, None]
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        )
        x = x + self.mlp(x)
        score = self.point_q(x) @ self.point_k(read.states).transpose(1, 2) * x.shape[-1] ** -0.5
        point = score.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        out: Tensor = point @ read.tokens + self.own(x)
        picked: Tensor = out.unflatten(1, (-1, steps))[rows, slot]
        return picked


def _slots(rows: Tensor) -> Tensor:
    """Which secret of its record each of the N is, ``[N]``; ``rows`` is sorted."""
    at = torch.arange(len(rows), device=rows.device)
    return at - torch.searchsorted(rows, rows)


def _causal(block: Block, x: Tensor) -> Tensor:
    """The block with a causal mask instead of a padding mask."""
    q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    at = torch.arange(x.shape[1], device=x.device)
    out = F.scaled_dot_product_attention(rotate_half(q, at), rotate_half(k, at), v, is_causal=True)
    x = x + block.out(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


class Network(nn.Module):
    """Reader, writer and the head that they share."""

    def __init__(self, channels: int, vocab: int, n_fields: int, width: int, blocks: int) -> None:
        super().__init__()
        self.reader = Reader(channels, width, blocks)
        self.writer = Writer(n_fields, vocab, width)
        self.head = nn.Linear(width, vocab)
