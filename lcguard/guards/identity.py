"""The guard that guards nothing: the yardstick for utility, and every attack's ceiling."""

from __future__ import annotations

import torch
from torch import Tensor

from lcguard.guards.base import GuardModule, Rewrite, register
from lcguard.protocols import Mask


@register("identity")
class IdentityGuard(GuardModule):
    by_token = True
    passes = True
    trained = False
    claim = "None: the receiver gets the raw segment."

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        return Rewrite(z, torch.zeros(valid.shape, device=z.device))
