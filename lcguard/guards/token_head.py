"""The network behind a category of a policy's own: one logit a token, from a detector's features.

A linear map of the frozen features, then convolutions over the tokens around, to both sides: what
makes a name one of a project stands before it as often as behind it, and a model's own keys and
values know only what came before. Small enough to be fitted on some dozens of examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.detector import bridged, peaked

GAP_TOKENS = 1
"""Holes of so many tokens inside a found value are closed."""
KERNEL, LAYERS = 5, 2


class TokenHead(nn.Module):
    """Features ``[B, T, F]`` to logits ``[B, T]``."""

    def __init__(self, features: int, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout = dropout
        self.read = nn.Linear(features, width)
        self.around = nn.ModuleList(
            nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(width)
        self.belongs = nn.Linear(width, 1)
        nn.init.constant_(self.belongs.bias, -3.0)  # rare

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """``valid [B, T]``."""
        x = F.layer_norm(features, features.shape[-1:])
        if self.training:  # whole features: neighbouring tokens would tell what single ones lack
            kept = torch.rand(len(x), 1, x.shape[2], device=x.device) >= self.dropout
            x = x * kept / (1 - self.dropout)
        x = F.gelu(self.read(x))
        for convolution in self.around:
            seen = (x * valid[..., None]).transpose(1, 2)
            x = x + F.gelu(convolution(seen).transpose(1, 2))
        logits: Tensor = self.belongs(self.norm(x))[..., 0]
        return logits


def belonging(logits: Tensor, valid: Tensor, threshold: float, peak: float) -> Tensor:
    """Which tokens belong to a value, ``[B, T]`` bool: runs of those above ``threshold``, of which
    one reaches ``peak``."""
    over = (logits - threshold).masked_fill(~valid, -torch.inf)
    marks = torch.where(over > 0, 0, -1)
    return peaked(bridged(marks, GAP_TOKENS), over, peak - threshold) >= 0
