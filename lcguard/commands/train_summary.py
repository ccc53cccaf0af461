"""What a training says at its end: a few lines and a verdict; ``summary.json`` has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcguard.evaluation.verdict import UTILITY_SHARE, figure
from lcguard.guards.frozen import Card
from lcguard.guards.standing import unproven


def verdict_of(card: Card, figures: Mapping[str, Any]) -> str:
    """One line: what may be said of a guard that no fresh attacker has tried yet."""
    why = unproven(card)
    if why:
        found = f"unproven: {why}"
    else:
        certificate = card.certificate or {}
        found = (
            f"certified: no attacker recovers a given secret more often than "
            f"{certificate['asr_ceiling']:.1%} (guessed blind "
            f"{certificate['blind_guess']:.1%}), in expectation over records like the held-out ones"
        )
    right, raw = figures.get("utility"), figures.get("utility_vanilla")
    if raw and right is not None and right < UTILITY_SHARE * raw:
        found += f"; the receiver keeps {right / raw:.1%} of its right answers"
    return found


def certificate_lines(certificate: Mapping[str, Any]) -> list[str]:
    """What a certificate says, for people."""
    said = [
        f"certificate: {figure(certificate['mean_nats'], 'nats')}, at most "
        f"{figure(certificate['upper_nats'])} ({certificate['level']:.0%}), on "
        f"{certificate['n_pairs']} held-out pairs; raw KV {figure(certificate['raw_nats'])}"
    ]
    found = certificate.get("secrets")
    if found is not None:
        name, worst = max(found["by_category"].items(), key=lambda row: row[1]["ceiling"])
        said.append(
            f"one secret: named by no attacker more often than {certificate['asr_ceiling']:.1%} "
            f"({found['level']:.0%}; guessed blind {certificate['blind_guess']:.1%}), on "
            f"{found['ceilings'][0]['secrets']} held-out secrets; {name} most: "
            f"{worst['ceiling']:.1%}"
        )
    return said


def ceiling_lines(certificate: Mapping[str, Any]) -> list[str]:
    """The same for who asked for nothing else: every blind guess, and the optimal attacker."""
    found = certificate["secrets"]
    said = [
        f"guessed blind {c['guess']:.1%}: {c['ceiling']:.1%}, at most {c['upper']:.1%}"
        for c in found["ceilings"]
    ]
    listed = found["listed"]
    if listed["asr"] is not None:
        said.append(
            f"measured: from {listed['candidates']} candidates the optimal attacker picks "
            f"{listed['asr']:.1%} (chance {listed['chance']:.1%})"
        )
    return [*certificate_lines(certificate), *said]


def lines(summary: Mapping[str, Any], out: Path) -> list[str]:
    """The end of a training for people."""
    certificate, attacked = summary["certificate"], summary["asr_train"]
    said = [
        f"guard {summary['guard']}: {out / 'guard'}, {summary['seconds']:.0f} s of training",
        f"task answers right: {figure(summary['utility'])}, on raw KV "
        f"{figure(summary['utility_vanilla'])}",
    ]
    if certificate is not None:
        said += certificate_lines(certificate)
    if attacked is not None:
        said.append(f"its own attacker recovers: {attacked:.1%} (no figure of privacy)")
    said.append(f"verdict: {summary['verdict']}")
    if summary["verdict"].startswith("unproven"):
        said.append(
            "next: an evaluation with this folder as a guard's `path`, `lcguard eval run`, then "
            f"`lcguard eval record RUN NAME {out / 'guard'}`; until then it is served by name alone"
        )
    return [*said, f"all figures: {out / 'summary.json'}"]
