"""Fixtures of several files."""

from __future__ import annotations

import pytest

from lcguard.protocols import AttackData
from tests.attacks.attackers import data_of, form
from tests.fixtures import World


@pytest.fixture(scope="module")
def pairs(world: World) -> AttackData:
    return data_of(world, form(400, 0))


@pytest.fixture(scope="module")
def victims(world: World) -> AttackData:
    return data_of(world, form(100, 1))


@pytest.fixture(scope="module")
def written(world: World) -> tuple[AttackData, AttackData]:
    """Attacker's and victims' pairs from generated prose."""
    return data_of(world, world.records), data_of(world, world.others)
