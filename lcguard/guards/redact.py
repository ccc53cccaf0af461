"""Exact removal where the secret spans are known: send the KV of the twin instead.

The publisher prefills the context with every forbidden value overwritten by neutral tokens; the
segment then is a function of a text without secrets. What remains is what the redacted text tells:
the secret's length and its surroundings. Fixed-length replacement hides the length too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcguard.guards.base import GuardModule, Rewrite, register
from lcguard.protocols import Mask


@register("redact")
class RedactGuard(GuardModule):
    by_token = True
    passes = True
    needs_twin = True
    trained = False
    claim = "Exact against every receiver, for the spans it is told; lengths and context remain."

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        return Rewrite(z, torch.zeros(valid.shape, device=z.device))
