"""``lcguard doctor`` on the machine: Python, packages, extras, memory and processor."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lcguard.commands import check_machine, serve
from lcguard.commands.check_machine import EXTRAS, check_memory, check_processor, memory_bytes
from lcguard.commands.checks import Advice
from tests.paths import ROOT
from tests.test_doctor import PLAIN_EDGE, doctor, edges, new_state


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return new_state(tmp_path / "state")


@contextmanager
def installed(
    folder: Path, *lines: str, name: str = "lcguard", number: str = "0.1.0"
) -> Iterator[None]:
    """A package as an installer describes it, found before any other of that name."""
    folder = folder / number  # of its own: a path that is there already comes no nearer
    described = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    described.mkdir(parents=True)
    text = "\n".join(("Metadata-Version: 2.4", f"Name: {name}", f"Version: {number}", *lines))
    (described / "METADATA").write_text(text + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def test_python_and_packages_that_do_not_fit(state: Path, tmp_path: Path) -> None:
    with installed(
        tmp_path,
        "Requires-Python: >=99",
        "Requires-Dist: torch>=99",
        "Requires-Dist: no-such-package>=1",
        "Requires-Dist: pydantic>=2",
    ):
        code, found, _ = doctor(state)
    assert code == 1
    assert found["python"][0] == "fails"
    assert "takes >=99" in found["python"][1]
    assert "no-such-package is missing" in found["packages"][1]
    assert "is not >=99" in found["packages"][1]
    assert "pydantic" not in found["packages"][1]
    assert list(found) == ["python", "packages"]  # nothing else could be relied on


def test_an_extra_fails_where_it_is_needed(state: Path, tmp_path: Path) -> None:
    edges(PLAIN_EDGE + ", detect: presidio")(state)
    lines = ("Provides-Extra: store", "Provides-Extra: pii", "Requires-Python: >=3.11")
    redis = 'Requires-Dist: redis>=99; extra == "store"'
    absent = 'Requires-Dist: no-such-finder>=1; extra == "pii"'
    with installed(tmp_path, *lines, redis):
        _, found, _ = doctor(state)
        assert found["extras"] == (
            "ok",
            "not installed, nor needed here: store (stores on Redis or Valkey)",
        )
        _, found, _ = doctor(state, "--set", "store=redis://127.0.0.1:1/0")
        assert found["extras"][0] == "fails"
        assert "pip install 'lcguard[store]'" in found["extras"][1]
    with installed(tmp_path, *lines, absent, number="0.1.1"):
        _, found, _ = doctor(state)
    assert "an edge with detect: presidio needs it: no-such-finder is missing" in found["extras"][1]
    spans = 'Requires-Dist: no-spans>=1; extra == "otel"'
    with installed(tmp_path, *lines, spans, number="0.1.3"):
        _, found, _ = doctor(state, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert "OTEL_EXPORTER_OTLP_ENDPOINT needs it: no-spans is missing" in found["extras"][1]
    with installed(tmp_path, *lines, 'Requires-Dist: no-web>=1; extra == "server"', number="0.1.2"):
        code, found, _ = doctor(state)
    assert code == 1
    assert "lcguard serve needs it: no-web is missing" in found["extras"][1]


def test_a_vllm_that_was_not_tested(state: Path, tmp_path: Path) -> None:
    with installed(tmp_path, name="vllm", number="9.9.9"):
        _, found, _ = doctor(state)
        assert found["vllm"] == (
            "fails",
            "vllm 9.9.9: not tested, install 0.32.0 or set untested_vllm",
        )
        (state / "server.yaml").write_text('engine: {untested_vllm: "9.9.9"}\n')
        _, found, _ = doctor(state)
    assert found["vllm"] == ("ok", "vllm 9.9.9: not tested, untested_vllm lets it in")


def test_every_extra_is_explained() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(told["optional-dependencies"]) - {"docs", "dev", "all"}
    assert check_machine.PACKAGE == told["name"]


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    assert memory_bytes(tmp_path) == 8 * 2**30
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text(f"{2**30}\n")
    (group / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == 8 * 2**30
    (group / "memory.max").write_text(f"{3 * 2**30}\n")
    assert memory_bytes(tmp_path) == 2 * 2**30


def test_a_tight_memory_is_a_warning() -> None:
    with pytest.raises(ValueError, match="take a smaller model"):
        check_memory(2 * 2**30, 2 * 2**30, "", "1")
    with pytest.raises(Advice, match="little is left"):
        check_memory(7 * 2**29, 2 * 2**30, "", "1")
    assert "(unset: set so by lcguard serve)" in check_memory(9 * 2**30, 0, "", "1")
    assert "VLLM_CPU_KVCACHE_SPACE=4 and" in check_memory(9 * 2**30, 0, "4", "1")


def test_a_processor_that_emulates_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(serve, "CPU_INFO", info)
    info.write_text("flags : sse avx2 avx512f\n")
    with pytest.raises(Advice, match="emulated"):
        check_processor(serve.bf16_flag(), ())
    assert "float32" in check_processor(serve.bf16_flag(), ("--dtype", "float32"))
    assert "float32" in check_processor(serve.bf16_flag(), ("--dtype=float32",))
    with pytest.raises(Advice, match="emulated"):  # the later word counts
        check_processor(serve.bf16_flag(), ("--dtype", "float32", "--dtype", "bfloat16"))
    info.write_text("flags : sse avx512_bf16\n")
    assert check_processor(serve.bf16_flag(), ()) == "bfloat16 by avx512_bf16"
