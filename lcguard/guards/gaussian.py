"""Isotropic Gaussian noise on every entry (ADAPT, the baseline of arXiv 2605.22786).

``z' = z + sigma * n`` with z standardised per channel, so sigma = 1 is as large as the signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcguard.guards.base import GuardModule, Rewrite, register
from lcguard.protocols import Mask


@register("gaussian")
class GaussianGuard(GuardModule):
    by_token = True
    trained = False
    claim = "Blurs every entry alike; a receiver that needs the task values can denoise the rest."

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        noise: float = 1.0

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        return Rewrite(z, torch.zeros(valid.shape, device=z.device))
