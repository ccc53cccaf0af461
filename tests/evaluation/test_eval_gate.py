"""The CI gate: it reads what it says it reads, and does not open where it cannot see."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lcguard.commands.evaluation import judge
from lcguard.evaluation.fail_if import METRICS, parse_fail_if


def row(guard: str, **changes: Any) -> dict[str, Any]:
    return {
        "guard": guard,
        "utility": 0.9,
        "utility_relative": 0.98,
        "asr_fresh": 0.04,
        "asr_fresh_ci": [0.01, 0.07],
        "asr_injection": 0.02,
        "floor": 0.03,
        "advantage": 0.01,
        "counts": {"success": 4, "resisted": 96, "error": 2, "not_applicable": 0},
        "likelihood": {"100": {"asr": 0.06, "ci": [0.03, 0.12], "floor": 0.02}},
    } | changes


REPORT = {
    "results": [
        row("identity", asr_fresh=0.9, asr_fresh_ci=[0.8, 0.95]),
        row("gate"),
        row("redact-fixed-length", utility=0.5),
    ]
}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("gate.asr_upper>0.05", ["gate: asr_upper 0.07 > 0.05"]),
        ("gate.asr_upper>0.07", []),
        ("gate.asr_upper>=0.07", ["gate: asr_upper 0.07 >= 0.07"]),
        ("gate.asr_lower<0.01", []),
        ("gate.errors!=0", ["gate: errors 2 != 0"]),
        ("gate.errors==2", ["gate: errors 2 == 2"]),
        ("redact-fixed-length.utility < 6e-1", ["redact-fixed-length: utility 0.5 < 0.6"]),
        ("asr>0.5", ["identity: asr 0.9 > 0.5"]),
        # the same guard must do both
        ("asr>0.5 and utility<0.6", []),
        (
            "asr>0.5 and redact-fixed-length.utility<0.6",
            ["identity: asr 0.9 > 0.5", "redact-fixed-length: utility 0.5 < 0.6"],
        ),
        # `and` binds closer than `or`
        ("gate.asr>0 or gate.asr>1 and gate.asr>1", ["gate: asr 0.04 > 0"]),
        ("(gate.asr>0 or gate.asr>1) and gate.asr>1", []),
        ("gate.injection>0.5 or gate.floor>0.5", []),
        ("gate.advantage>-1", ["gate: advantage 0.01 > -1"]),
    ],
)
def test_expressions(text: str, lines: list[str]) -> None:
    assert parse_fail_if(text).violations(REPORT) == lines


def test_likelihood_gates() -> None:
    assert parse_fail_if("gate.likelihood>0.05").violations(REPORT) == [
        "gate: likelihood 0.06 > 0.05"
    ]
    assert parse_fail_if("gate.likelihood_upper>0.1").violations(REPORT) == [
        "gate: likelihood_upper 0.12 > 0.1"
    ]
    assert parse_fail_if("gate.likelihood_upper>0.15").violations(REPORT) == []
    unseen = {"results": [row("gate", likelihood={})]}
    assert "not measured" in parse_fail_if("likelihood_upper>0.15").violations(unseen)[0]


def test_advantage_is_taken_from_what_it_is_made_of() -> None:
    changed = {"results": [row("gate", advantage=None)]}
    assert parse_fail_if("advantage>0.005").violations(changed) == ["gate: advantage 0.01 > 0.005"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sign", [">", "<"])
def test_what_was_not_measured_is_violated(metric: str, sign: str) -> None:
    """Whichever way the comparison points."""
    empty = dict.fromkeys(row("gate")) | {"guard": "gate"}
    (line,) = parse_fail_if(f"{metric}{sign}0.5").violations({"results": [empty]})
    assert "gate" in line
    assert "not measured" in line


def test_several_hops() -> None:
    """A guard has a row for every topology; the graph's ASR is what counts."""
    rows = [
        {
            "topology": t,
            "guard": g,
            "variant": "per-agent",
            "utility": 0.9,
            "floor": 0.01,
            "asr_graph": asr,
            "asr_graph_ci": [asr, asr + 0.1],
            "errors": 1,
        }
        for t, g, asr in (("chain", "gate", 0.1), ("tree", "gate", 0.3), ("tree", "none", 0.9))
    ]
    report = {"results": rows}
    assert parse_fail_if("gate.asr_upper>0.35").violations(report) == [
        "tree gate per-agent: asr_upper 0.4 > 0.35"
    ]
    assert len(parse_fail_if("gate.advantage>0.05").violations(report)) == 2
    assert len(parse_fail_if("asr>0.2").violations(report)) == 2
    assert parse_fail_if("gate.asr>0.5 or errors>1").violations(report) == []
    (line, *_) = parse_fail_if("gate.injection>0.5").violations(report)
    assert "not measured" in line


def test_a_report_without_guards_is_violated() -> None:
    assert parse_fail_if("asr>0.5").violations({"results": []})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("asrr>0.5", "asrr"),
        ("gate.speed>1", "speed"),
        ("asr>", "ends"),
        ("asr 0.5", "no comparison"),
        ("asr=0.5", "cannot be read"),
        ("asr>high", "'high'"),
        ("asr>nan", "'nan'"),
        ("asr>0.5 utility<1", "'utility'"),
        ("(asr>0.5", "ends"),
        ("", "ends"),
        ("asr>0.5; import os", "'0.5;'"),
        ("__import__('os')>1", "__import__"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="asr_upper") as caught:
        parse_fail_if(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_guard_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="identity, gate, redact-fixed-length"):
        parse_fail_if("gates.asr>0.5").violations(REPORT)


LEAVES = st.builds(
    lambda m, s, n: f"gate.{m} {s} {n}",
    st.sampled_from(["asr", "asr_upper", "utility", "floor", "errors"]),
    st.sampled_from([">", ">=", "<", "<=", "==", "!="]),
    st.sampled_from([0.03, 0.04, 0.07, 0.9, 2]),
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"{a} and {b}", inner, inner),
        st.builds(lambda a, b: f"{a} or {b}", inner, inner),
        st.builds(lambda a: f"({a})", inner),
    ),
    max_leaves=6,
)


class Values:
    asr, asr_upper, utility, floor, errors = 0.04, 0.07, 0.9, 0.03, 2


@given(EXPRESSIONS)
def test_it_means_what_the_same_words_mean_in_python(text: str) -> None:
    expected = bool(eval(text, {"__builtins__": {}}, {"gate": Values}))
    assert bool(parse_fail_if(text).violations(REPORT)) is expected


def judged(report: dict[str, Any], *gates: str) -> tuple[int, list[str]]:
    out = io.StringIO()
    code = judge(report, [parse_fail_if(g) for g in gates], Console(file=out))
    return code, out.getvalue().splitlines()


def test_exit_codes() -> None:
    failed = {**REPORT, "errors": {"attempts": 6, "budget": 5, "exceeded": True}}
    assert judged(REPORT) == (0, [])
    assert judged(REPORT, "asr>0.99", "gate.asr>0.5") == (0, [])
    assert judged(REPORT, "gate.asr>0.03", "asr>0.5") == (
        3,
        ["violated: gate: asr 0.04 > 0.03", "violated: identity: asr 0.9 > 0.5"],
    )
    assert judged(failed) == (4, ["errors: 6 attempts ended in an error, the budget is 5"])
    assert judged(failed, "asr>0.5")[0] == 3
