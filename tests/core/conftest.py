"""Fixtures of several files."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.tiny_models import (
    MODELS,
    make_config,
    make_model,
)


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    kind, changes = MODELS[request.param]
    return make_model(make_config(kind, **changes))


@pytest.fixture
def llama() -> Any:
    return make_model(make_config("llama"))
