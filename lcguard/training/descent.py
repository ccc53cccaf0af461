"""AdamW with a warm-up and a linear decay to zero: how the small networks here are fitted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Descent:
    """``steps`` steps of AdamW, gradients clipped to a norm of one."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        steps: int,
        lr: float,
        warmup: int,
        weight_decay: float = 0.0,
    ) -> None:
        self._weights, self._steps, self._lr, self._warmup = list(weights), steps, lr, warmup
        self._optimizer = torch.optim.AdamW(self._weights, lr=lr, weight_decay=weight_decay)

    def down(self, step: int, loss: Tensor) -> float:
        """Follows the gradient of the loss, which it returns. Raises ``ValueError`` for one that is
        not finite."""
        value = float(loss.detach())
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {value} at step {step}: lower lr")
        rate = min(1.0, (step + 1) / self._warmup) * (1 - step / self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * rate
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        return value
