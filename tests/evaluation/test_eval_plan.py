"""Plans of evaluations: presets, fresh attackers, quick and stressed runs, progress."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lcguard.agents.models import NAMED
from lcguard.agents.scenarios.load import load_hops
from lcguard.commands.detector import DetectorRun
from lcguard.commands.evaluation import load
from lcguard.commands.progress import progress
from lcguard.config import dump_config, load_config
from lcguard.evaluation.compare import compare
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.fresh_attacks import check_fresh, check_headline
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.presets import load_plan, preset, shipped
from lcguard.evaluation.quick import quickened
from lcguard.evaluation.stress import stressed
from tests.test_cli import lcguard

# -- the headline


def spec(**options: Any) -> EvalConfig:
    return EvalConfig(attacks=(AttackSpec("mine", options=options),))


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "attacker"},
        {"fit": {"checkpoint": "last"}},
        {"start": "runs/attacker.safetensors"},
    ],
)
def test_an_attacker_that_brings_weights_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="saved weights"):
        check_fresh(spec(**options))


def test_a_folder_of_weights_is_recognised(tmp_path: Path) -> None:
    check_fresh(spec(words=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="saved weights"):
        check_fresh(spec(words=str(tmp_path)))


def test_a_model_has_presets_of_its_own_and_else_the_embedded_ones() -> None:
    own = load_plan(EvalConfig, "agentleak", ["model=smollm2"], None)
    assert [g.path for g in own.guards if g.path] == ["smollm2:twin"]
    assert "nano:gate" in [g.path for g in load_plan(EvalConfig, "agentleak", [], None).guards]
    assert load_plan(EvalConfig, "demo", ["model=smollm2"], None).model == "smollm2"
    assert load_plan(EvalConfig, "demo", ["model=other"], None).guards == (
        load_plan(EvalConfig, "demo", [], None).guards
    )
    with pytest.raises(ValueError, match="with model=smollm2 also: agentleak, budget, demo"):
        preset("nothing", "smollm2")


def test_a_share_keeps_the_split_whatever_the_number_of_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hops = load_hops("generator", path=None, seed=1, split="test", n=60)

    monkeypatch.setattr("lcguard.evaluation.load.load_hops", lambda *args, **options: hops)
    data = DataConfig("agentleak", train_records=4500, test_records=1500)  # all there are

    def names(data: DataConfig) -> list[set[str]]:
        return [{h.scenario_id for h in side} for side in hops_for(data)]

    fitted, held = names(data)
    for n in (4, 7):
        few = replace(data, train_records=n, test_records=n, train_share=0.75)
        train, test = hops_for(few)
        assert (len(train), len(test)) == (n, n)
        assert names(few)[0] <= fitted
        assert names(few)[1] <= held
    loose = names(replace(data, train_records=7, test_records=14))[1]
    assert loose & fitted  # without it fewer records move the border


def test_no_preset_measures_what_the_shipped_detector_was_fitted_on() -> None:
    """The scenarios' order is the seed's, so a border that is not before the detector's will do."""
    detector = load_plan(DetectorRun, "twin", ["model=smollm2"], None, "detect-")
    fitted = {d.source: d for d in detector.sources if d.source != "generator"}
    for name, own in fitted.items():
        data = load_plan(EvalConfig, name, ["model=smollm2"], None).data
        assert data.seed == own.seed
        assert data.train_share is not None
        assert data.train_share >= own.train_records / (own.train_records + own.test_records)


def test_shipped_presets_are_fresh() -> None:
    for path in (p for model in NAMED for p in shipped(model)):
        if not path.stem.startswith(("train-", "detect-")):
            check_fresh(load_config(EvalConfig, path))


def test_the_headline_is_from_an_attack_of_this_run() -> None:
    def attempt(kind: Any) -> Attempt:
        return Attempt(
            scenario="s",
            edge="a>b",
            record="r",
            guard="gate",
            policy="edge",
            attack="mine",
            seed=0,
            category="health",
            field="f/0",
            kind=kind,
            outcome=Outcome.SUCCESS,
        )

    row = {"guard": "gate", "asr_fresh_best": "mine"}
    check_headline([row], [attempt("attack")], spec())
    for attempts in ([], [attempt("train")], [attempt("floor")]):
        with pytest.raises(ValueError, match="not fitted in this run"):
            check_headline([row], attempts, spec())
    with pytest.raises(ValueError, match="'theirs'"):
        check_headline([{**row, "asr_fresh_best": "theirs"}], [attempt("attack")], spec())


def test_compare_counts_what_is_gone_and_tells_noise() -> None:
    def report(**guards: tuple[float | None, float]) -> dict[str, Any]:
        rows = [
            {
                "guard": g,
                "utility": 0.9,
                "asr_fresh": v,
                "asr_fresh_ci": None if v is None else [v - e, v + e],
            }
            for g, (v, e) in guards.items()
        ]
        return {"results": rows}

    found = compare(
        report(a=(0.1, 0.1), b=(0.1, 0.01), c=(0.1, 0.1), d=(0.1, 0.1)),
        report(a=(0.2, 0.1), b=(0.2, 0.01), c=(None, 0.0), e=(0.9, 0.1)),
    )
    by_name = {g.guard: g for g in found.guards}
    assert (by_name["a"].worse, by_name["a"].moves["asr"].overlap) == (True, True)
    assert (by_name["b"].worse, by_name["b"].moves["asr"].overlap) == (True, False)
    assert by_name["b"].moves["asr"].difference == pytest.approx(0.1)
    assert by_name["c"].worse  # no longer measured
    assert by_name["d"].worse  # no longer there
    assert not by_name["e"].worse  # was not there
    assert len(found.regressions()) == 5  # d lost its utility too


def test_list_shows_what_is_registered(tmp_path: Path) -> None:
    shown = lcguard("eval", "list", "--attacks", "--guards", "--presets", cwd=tmp_path).stdout
    for word in (
        "white-box",
        "arXiv 2508.09442",
        "redact",
        "lcguard train gate-finish",
        "lcguard eval run main",
    ):
        assert word in shown


# -- progress and stress


@pytest.mark.parametrize(
    ("terminal", "ci", "bar"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_bar_is_for_people(
    terminal: bool, ci: str, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=terminal), 8) as (say, advance):
        advance(3)
        say("a line")
    assert "a line" in out.getvalue()
    assert ("3/8" in out.getvalue()) is bar


def test_stress_makes_every_attack_stronger(tmp_path: Path) -> None:
    weak = EvalConfig(
        guards=(GuardSpec("a"), GuardSpec("b", attacks=("one",)), GuardSpec("c", attacks=("two",))),
        attacks=(
            AttackSpec("one", "probe", {"width": 7, "fit": {"steps": 20, "lr": 0.1}}),
            AttackSpec("two", options={"width": 32}, warm=True, clean_fit={"steps": 5}),
            AttackSpec("three", "injection"),
        ),
    )
    strong = stressed(weak)
    by_name = {a.name: a for a in strong.attacks}
    assert by_name["one"].options == {"width": 7, "fit": {"steps": 200, "lr": 0.1}}
    assert by_name["two"].options == {"width": 64, "fit": {"steps": 3000}}
    assert by_name["two"].clean_fit == {"steps": 50}
    assert by_name["three"].options == {}
    probes = [f"probe-layer{i}" for i in range(4)]  # of the nano agent
    assert list(by_name) == ["one", "two", "three", *probes]
    assert by_name["probe-layer2"].options == {**by_name["one"].options, "layers": [2]}
    assert [g.attacks for g in strong.guards] == [(), ("one", *probes), ("two",)]
    with pytest.raises(ValueError, match="probe-layer0"):
        stressed(strong)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(strong))
    assert load_config(EvalConfig, path) == strong
    RunFolder(tmp_path).check(strong)
    with pytest.raises(ValueError, match="title"):
        RunFolder(tmp_path).check(weak)


def test_quick_makes_less_of_everything() -> None:
    full = load(Path("demo"), (), None)
    assert isinstance(full, EvalConfig)
    quick = quickened(full)
    assert (quick.data.train_records, quick.data.test_records) == (225, 40)
    by_name = {a.name: a for a in quick.attacks}
    assert by_name["probe"].options == {"fit": {"steps": 33, "batch": 2048}}
    assert by_name["decoder-warm"].clean_fit["steps"] == 40
    assert by_name["likelihood"].options == {"lists": [10, 100], "max_records": 6}
    assert [g.name for g in quick.guards] == [g.name for g in full.guards]
    assert (quick.policies, quick.derived, quick.seeds) == ((), None, (0,))
    assert load(Path("demo"), (), None, quick=True) == quick
    # of several attacks of a kind the first, and no list that takes minutes
    main = load(Path("main"), (), None, quick=True)
    assert [a.name for a in main.attacks] == ["probe", "decoder-warm", "likelihood"]
    assert main.attacks[-1].options["lists"] == [10, 100]
    real = load(Path("main"), ("model=smollm2",), None, quick=True)
    assert isinstance(real, EvalConfig)
    assert (real.data.train_records, real.data.test_records) == (8, 6)
