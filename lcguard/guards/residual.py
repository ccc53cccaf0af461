"""The published guard: one residual bottleneck per layer for keys and one for values.

``K' = K + W2 GELU(W1 LN(K))`` and V alike (arXiv 2605.22786), R being the bottleneck width. All KV
heads of a layer are seen together; keys are un-rotated here. Starts as the identity. Like the
paper's, it is per token and knows neither policy nor context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.protocols import Mask


@register("residual")
class ResidualGuard(GuardModule):
    by_token = True
    claim = "Trained so that one decoder fails; nothing is claimed against a fresh attacker."

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        bottleneck: int = 24

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        r, width = self.config.bottleneck, shape.kv_heads * shape.head_dim
        if not 0 < r:
            raise ValueError(f"bottleneck {r} must be positive; the paper keeps it below {width}")
        self.gain = nn.Parameter(torch.ones(shape.layers, 2, width))
        self.bias = nn.Parameter(torch.zeros(shape.layers, 2, width))
        self.down = nn.Parameter(torch.randn(shape.layers, 2, width, r) * width**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(shape.layers, 2, r))
        self.up = nn.Parameter(torch.zeros(shape.layers, 2, r, width))
        self.up_bias = nn.Parameter(torch.zeros(shape.layers, 2, width))

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        normed = F.layer_norm(z, z.shape[-1:]) * self.gain + self.bias
        hidden = F.gelu(torch.einsum("btlkc,lkcr->btlkr", normed, self.down) + self.down_bias)
        delta = torch.einsum("btlkr,lkrc->btlkc", hidden, self.up) + self.up_bias
        return Rewrite(z + delta, torch.zeros(valid.shape, device=z.device))
