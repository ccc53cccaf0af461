"""Run configurations: strict types, refused keys, overrides, round trips."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.config import ConfigError, dump_config, load_config


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """Learning rate."""
    steps: int = 10
    kind: Literal["adam", "sgd"] = "adam"


@dataclass(frozen=True)
class Run:
    name: str
    optim: Optim = field(default_factory=Optim)
    layers: tuple[int, ...] = (1, 2)
    out: Path = Path("runs")
    stages: tuple[Optim, ...] = ()
    resume: bool = False
    note: str | None = None
    weights: dict[str, float] = field(default_factory=dict)


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(Run, path, overrides)


def test_defaults_and_nesting(tmp_path: Path) -> None:
    run = load(tmp_path, "name: x\noptim: {lr: 1e-4}\nlayers: [3]\nout: a/b\nstages: [{steps: 2}]")
    assert run == Run("x", Optim(1e-4), (3,), Path("a/b"), (Optim(steps=2),))
    assert isinstance(run.optim, Optim)


def test_overrides(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        "name: x\noptim: {steps: 3}",
        "optim.lr=1e-2",
        "optim.kind=sgd",
        "layers=[4, 5]",
        "resume=true",
        "note=a=b",
        "weights.health=2",
    )
    assert run.optim == Optim(1e-2, 3, "sgd")
    assert (run.layers, run.resume, run.note, run.weights) == ((4, 5), True, "a=b", {"health": 2.0})


def test_without_a_file() -> None:
    assert load_config(Run, None, ["name=x"]) == Run("x")
    assert load_config(Optim, None) == Optim()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\noptin: {}", "optin = {}: unknown key; did you mean 'optim'?"),
        ("name: x\noptim: {lrr: 1}", "optim.lrr = 1: unknown key; did you mean 'lr'?"),
        ("name: x\nlr: 1", "lr = 1: unknown key; did you mean 'optim.lr'?"),
        ("name: x\noptim: {zzz: 1}", "optim.zzz = 1: unknown key; valid keys: lr, steps, kind"),
        ("name: x\nstages: [{}, {step: 1}]", "stages[1].step = 1: unknown key; did you mean"),
        ("name: x\noptim: {lr: fast}", "optim.lr = 'fast': input should be a valid number"),
        ("name: x\noptim: {steps: '3'}", "optim.steps = '3'"),
        ("name: x\noptim: {steps: 3.0}", "optim.steps = 3.0"),
        ("name: x\noptim: {steps: true}", "optim.steps = True"),
        ("name: x\noptim: {kind: adm}", "optim.kind = 'adm' is unknown: did you mean"),
        ("name: x\nresume: no", "resume = 'no'"),
        ("name: 3", "name = 3"),
        ("name: x\noptim:", "optim = None"),
        ("optim: {}", "name: missing; add `name: ...`"),
        ("", "name: missing"),
        ("name: x\nname: y", "line 2, column 1: not valid YAML: duplicate key 'name'"),
        ("name: x\n1: y", "1 = 'y': unknown key"),
        ("[1]: 2", "not valid YAML: unhashable"),
        ("[" * 5000, "not valid YAML"),
        ("name: !!python/name:os.system", "not valid YAML"),
        ("name: !!set {a, b}", "write plain YAML"),
        ("- x", "top level is a list"),
        ("name: x\nresume: 1\noptim: {lr: a}", "(and 1 more)"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(tmp_path / "run.yaml"))
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim", "not of the form a.b=c"),
        ("=3", "not of the form a.b=c"),
        ("optim..lr=3", "not of the form a.b=c"),
        ("name.x=3", "name = 'x' holds no keys"),
        ("optim.lr=[", "not valid YAML"),
        ("optim.lr=slow", "optim.lr = 'slow'"),
        ("optim.rate=1", "optim.rate = 1: unknown key"),
    ],
)
def test_refuses_overrides(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "name: x", override)
    assert expected in str(caught.value)
    assert f"--set {override}" in str(caught.value)


@given(
    st.builds(
        Run,
        name=st.text(),
        optim=st.builds(Optim, lr=st.floats(allow_nan=False), steps=st.integers(-(2**60), 2**60)),
        layers=st.lists(st.integers(-9, 9)).map(tuple),
        out=st.just(Path("a/b")),
        stages=st.lists(st.builds(Optim)).map(tuple),
        resume=st.booleans(),
        note=st.none() | st.text() | st.sampled_from(["no", "1e3", "null", "~", "1:30", "010", ""]),
        weights=st.dictionaries(st.text(), st.floats(-1, 1)),
    )
)
def test_dump_round_trip(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(dump_config(run), encoding="utf-8", newline="")
    assert load_config(Run, path) == run
