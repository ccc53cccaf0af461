"""What rounds against attackers buy: what the rows train, and the table that comes of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lcguard.commands.detector import DetectorRun
from lcguard.commands.detector_rounds import RoundsConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = """
model: nano
sources:
  - {source: generator, seed: 5, train_records: 200, test_records: 64}
  - {source: generator, seed: 6, train_records: 160, test_records: 32, forms: [mail, chat]}
options: {width: 32, blocks: 1}
validation_share: 0.2
detector: {steps: 300, batch: 4}
"""


def script(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    patch.syspath_prepend(SCRIPTS)  # as where it is started
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("bench_attacked_rounds", monkeypatch)


def test_rows_differ_in_one_option_each_and_train_as_long(bench: ModuleType) -> None:
    args = SimpleNamespace(model="smollm2", data="", quick=False)
    runs: dict[str, DetectorRun] = {name: bench.run_of(name, 0, args) for name in bench.ROWS}
    steps = {r.detector.steps + r.rounds.count * r.rounds.steps for r in runs.values()}
    assert steps == {300}
    assert len({repr((r.sources, r.options, r.validation_share)) for r in runs.values()}) == 1
    base = runs.pop("rounds, hard examples").rounds

    def changed(rounds: RoundsConfig) -> set[str]:
        return {k for k, v in vars(rounds).items() if v != getattr(base, k)}

    found = {name: changed(r.rounds) for name, r in runs.items()}
    options = ("budget_strength", "uncertain_nats", "rollback_slack")
    assert found.pop("one fit on all records") == {"count", "steps"}
    assert list(found.values()) == [{"hard_weight"}, *({o} for o in options), set(options)]


def test_a_row_is_made_once_and_makes_a_line(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(bench, "CONFIG", tmp_path / "tiny.yaml")
    work, out = tmp_path / "work", tmp_path / "rounds.json"
    told = ["--work", str(work), "--out", str(out), "--model", "nano", "--rows", "3", "--quick"]
    assert bench.main(told) == 0
    report = json.loads(out.read_text())
    assert [r["name"] for r in report["rows"]] == list(bench.ROWS)[:3]
    for made in report["rows"]:
        assert 0 < made["asked"] == made["total"]
        # what is missed stands in clear, and is more than what was missed in part alone
        assert made["recovered"] <= made["total"] - made["found"]
    monkeypatch.setattr(bench, "train_detector", lambda *a: pytest.fail("trained again"))
    assert bench.main(told) == 0
    assert json.loads(out.read_text())["rows"] == report["rows"]
    with pytest.raises(ValueError, match="made with other settings: give another --work"):
        bench.main(told[:-1])
    table = script("rounds_columns", monkeypatch).attacked_rounds(report)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        f"| {name}" for name in list(bench.ROWS)[:3]
    ]
    assert f"| {report['rows'][0]['found']} of {report['rows'][0]['total']} |" in table
