"""One small guard of every kind."""

from __future__ import annotations

from typing import Any

import torch

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.erasure import ErasureGuard
from lcguard.guards.frozen import FrozenGuard
from tests.fixtures import random_kv
from tests.matrix import GUARDS

SHAPE = KVShape(2, 2, 8)


def module_of(name: str, **changes: Any) -> GuardModule:
    """Random parameters and statistics: some guards start as the identity, which hides much."""
    module = guard_class(name).build(SHAPE, len(CATEGORIES), {**GUARDS[name], **changes})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        for m in guards_in(module):
            m.center.normal_()
            m.scale.uniform_(0.5, 2.0)
    for m in guards_in(module):
        if isinstance(m, ErasureGuard):  # refuses to be applied before it knows its concepts
            kv = random_kv((40,) * 8, tuple(SHAPE), seed=7)
            m.fit_concepts(kv, torch.arange(320).view(8, 40) % (m.n_concepts + 1) - 1)
    return module


def guards_in(module: GuardModule) -> list[GuardModule]:
    """The guard and its parts, where it has any."""
    return [m for m in module.modules() if isinstance(m, GuardModule)]


def guard_of(name: str, **changes: Any) -> FrozenGuard:
    return FrozenGuard(module_of(name, **changes)).with_card(model_digest="d" * 64)
