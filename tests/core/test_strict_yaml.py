"""YAML 1.2's scalars, and aliases: a few are a convenience, many are a bomb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lcguard.config import load_config
from lcguard.handoff.policy import load_policy
from lcguard.server.access.keyring import load_keys
from lcguard.strict_yaml import ALIAS_BUDGET, YamlError, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("1:30", "1:30"),
        ("1e-3", 1e-3),
        ("010", 10),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("-.5", -0.5),
        ("true", True),
        ("", None),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def bomb(levels: int) -> str:
    """Each line says the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@dataclass(frozen=True)
class Empty:
    names: dict[str, Any] = field(default_factory=dict)


READERS: dict[str, Callable[[Path], object]] = {
    "policy": load_policy,
    "keys": load_keys,
    "configuration": lambda path: load_config(Empty, path),
    "--set": lambda path: load_config(Empty, None, [f"names={path.read_text()}"]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(6), f"aliases stand for more than {ALIAS_BUDGET} characters"),
        (f"a: &a {'x' * 6000}\nb: [*a, *a]", "aliases stand for more than"),
        ("a: &a [*a]", "alias *a stands within what it names"),
        ("a: &a {b: &b [*a]}", "alias *a stands within what it names"),
    ],
)
def test_aliases_that_multiply_are_refused_wherever_yaml_is_read(
    reader: str, text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="not valid YAML") as caught:
        READERS[reader](path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value).replace(text, "")
    assert len(str(caught.value).replace(text, "")) < 300


def test_an_alias_for_a_few_names_is_read() -> None:
    text = "a: &f [health, finance]\nb: *f\nc: {d: *f}"
    names = ["health", "finance"]
    assert parse_yaml(text) == {"a": names, "b": names, "c": {"d": names}}


tree = st.recursive(
    st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)


@given(tree, st.lists(st.integers(1, 6), max_size=5))
def test_what_is_read_is_never_larger_than_file_and_budget(data: Any, repeats: list[int]) -> None:
    for n in repeats:
        data = [data] * n  # PyYAML writes the second and later ones as aliases
    text = yaml.safe_dump(data)
    try:
        found = parse_yaml(text)
    except YamlError as error:
        assert "aliases stand for more" in str(error)  # noqa: PT017
        return
    assert found == data
    assert len(str(found)) <= 8 * (len(text) + ALIAS_BUDGET)
