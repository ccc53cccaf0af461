"""A detector fitted on the tiny model, for the guards that have one."""

from __future__ import annotations

from lcguard.categories import CATEGORIES
from lcguard.guards import KVShape
from lcguard.guards.twin import TwinGuard
from lcguard.records import TokenRecord
from lcguard.training.fit_detector import (
    DetectorConfig,
    ReadRecords,
    choose_thresholds,
    fit_detector,
    read_records,
)
from tests.fixtures import World, make_records

CONFIG = DetectorConfig(
    steps=150, batch=8, lr=4e-3, warmup=10, dropout=0.0, touch_cost=0.0, task_weight=1.0
)
OPTIONS = {"width": 32, "blocks": 1, "peak": 0.0}
Fitted = tuple[TwinGuard, list[TokenRecord], ReadRecords]


def fit_twin(world: World) -> Fitted:
    """Guard, its records and what it read of them; thresholds from the same records."""
    records = make_records(world.encoder, 48, seed=3)
    module = TwinGuard.build(KVShape(*world.source.shape), len(CATEGORIES), OPTIONS)
    read = read_records(module, records, world.source)
    fit_detector(module, [read], CONFIG)
    options = module.options() | {"thresholds": choose_thresholds(module, [read], CONFIG)}
    done = TwinGuard.build(KVShape(*world.source.shape), len(CATEGORIES), options)
    done.load_state_dict(module.state_dict())
    return done, records, read
