"""A teacher that is less certain where the guard cannot follow it (after arXiv 2605.21999).

The receiver on raw KV is the teacher of the receiver on guarded KV. Where an answer needs what the
policy withholds it is certain and cannot be followed: pressed to, the guard learns those records by
heart. So each answer token's temperature rises with the distance that is left,

    T = max(1, KL(teacher || student) / n),

and with it the target nears the uniform law. The distance is taken without a gradient: a guard
gains nothing by staying far away. The paper trains classifiers against attacks; the rule for T is
our own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats ``[N]``, from logits ``[N, V]``."""
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


@torch.no_grad()
def softened(student: Tensor, teacher: Tensor, nats: float) -> Tensor:
    """The teacher's logits ``[N, V]``, each token's at its own temperature; ``nats`` is n."""
    distance = token_kl(student, teacher)
    return teacher / (distance / nats).clamp_min(1.0)[:, None]
