"""The tables of a report, once for Markdown and HTML; every figure is read from the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcguard.evaluation.intervals import zero_success_caveat
from lcguard.evaluation.results import LIST, Counts, GuardRow, Recall, Report
from lcguard.evaluation.verdict import (
    NOT_MEASURED,
    RULE,
    count,
    figure,
    percent,
    percent_ci,
    verdict,
)


@dataclass(frozen=True)
class Table:
    """Headers and rows of plain text; the writers escape it."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


Lines = Callable[[GuardRow], list[tuple[str, ...]]]


def _per_guard(
    report: Report, title: str, headers: Sequence[str], lines: Lines, note: str = ""
) -> Table:
    """A table with the guard's name first; ``lines`` are the other cells of a guard's rows."""
    rows = [(row.guard, *line) for row in report.results for line in lines(row)]
    return Table(title, ("Guard", *headers), rows, note)


def overview(found: Report | Mapping[str, Any]) -> Table:
    """The table that opens the report."""
    report = Report.of(found)

    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        judged, share = verdict(row), row.utility_share
        job = NOT_MEASURED if share is None else f"{share:.1%} of unguarded"
        if row.utility is not None:
            job += f" ({figure(row.utility)} against {figure(row.utility_vanilla)})"
        fresh = percent_ci(row.asr_fresh, row.asr_fresh_ci)
        listed = percent_ci(row.listed.asr, row.listed.ci)
        return [(job, fresh, percent(row.floor), listed, f"{judged.word}: {judged.reason}")]

    headers = (
        "Can the receiver still do its job?",
        "What a fresh attacker recovers",
        "If it knew nothing (floor)",
        f"Who enumerates {LIST} candidates",
        "Verdict",
    )
    return _per_guard(report, "At a glance", headers, lines, f"Rule: {RULE}")


def details(report: Report) -> list[Table]:
    """All other tables, those without rows included: the writers say so."""
    makers = (_attackers, _attempts, _by_attack, _by_category, _lists, _cost, _certificates)
    return [make(report) for make in (*makers, _detections, _policies, _derived, _length_channel)]


def _attackers(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        fresh = percent_ci(row.asr_fresh, row.asr_fresh_ci)
        rest = (row.advantage, row.any_of_k, row.asr_injection, row.floor, row.ceiling)
        return [(percent(row.asr_train), fresh, *map(percent, rest))]

    headers = (
        "Training-time ASR",
        "Fresh ASR",
        "Advantage over floor",
        "Any of k",
        "Prompt injection",
        "Floor",
        "Ceiling (no guard)",
    )
    note = (
        "Fresh: trained from scratch after the guard was frozen, knowing it. Any of k: share "
        "of secrets that at least one attack or seed recovered. Intervals at 95%."
    )
    title = "Attackers, from the one the guard was trained against to the strongest"
    return _per_guard(report, title, headers, lines, note)


def _outcomes(found: Counts | None) -> tuple[str, ...]:
    c = found or Counts()
    return tuple(map(count, (c.success, c.resisted, c.error, c.not_applicable)))


def _attempts(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        c, caveat = row.counts, None
        if c is not None and c.success is not None and c.resisted is not None:
            caveat = zero_success_caveat(c.success, c.success + c.resisted)
        return [(*_outcomes(c), caveat or "none")]

    headers = ("Success", "Resisted", "Error", "Not applicable", "Caveat")
    note = "ASR = success / (success + resisted). Errors never count for the guard."
    return _per_guard(report, "Attempts", headers, lines, note)


def _by_attack(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        return [
            (
                name,
                percent_ci(found.asr, found.ci),
                percent(found.token_accuracy),
                figure(found.ce_gap_nats, "nats"),
            )
            for name, found in row.asr_fresh_by_attack.items()
        ]

    headers = ("Attack", "ASR", "Token accuracy", "Cross-entropy gap")
    return _per_guard(report, "Fresh attackers one by one", headers, lines)


def _by_category(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        return [
            (
                name,
                percent(found.asr),
                *(
                    f"{ci[0]:.1%} to {ci[1]:.1%}" if ci else NOT_MEASURED
                    for ci in (found.wilson, found.bootstrap)
                ),
                percent(found.floor),
                percent(found.ceiling),
                count(found.n),
            )
            for name, found in row.asr_by_category.items()
        ]

    headers = ("Category", "ASR", "Wilson", "Bootstrap", "Floor", "Ceiling", "n")
    return _per_guard(report, "Fresh ASR per category", headers, lines)


def _lists(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        length = figure(row.likelihood.length_nats, "nats")
        return [
            (
                size,
                percent_ci(found.asr, found.ci),
                percent(found.floor),
                percent(found.blind),
                figure(found.rank_median),
                figure(found.nats, "nats"),
                length,
                percent(found.shorter),
                count(found.n),
            )
            for size, found in row.likelihood.sizes.items()
        ]

    headers = (
        "Candidates",
        "ASR",
        "Chance",
        "Blind",
        "Median rank",
        "Gained",
        "By the length alone",
        "Lists that are shorter",
        "n",
    )
    note = (
        "By the exact likelihood of the segment, knowing model, guard and the rest of the "
        "record. Chance: 1 over the candidates really in the list, all of the true value's length. "
        "Blind: the same attack on segments of other records. Gained: nats over the prior."
    )
    title = "The optimal attacker, who chooses from a list of candidates"
    return _per_guard(report, title, headers, lines, note)


def _cost(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        times = (figure(row.latency_ms.get(key), "ms") for key in ("prefill", "guard"))
        return [(*times, percent(row.bytes_share), row.note or "none")]

    return _per_guard(
        report, "Cost", ("Prefill", "Guard itself", "Bytes that travel", "Note"), lines
    )


def _certificates(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        found = row.certificate
        if found is None:
            return []
        limit = percent(found.asr_ceiling)
        nats = (
            found.mean_nats,
            found.upper_nats,
            found.p99_nats,
            found.max_nats,
            found.entropy_nats,
        )
        limit = f"vacuous ({limit})" if found.vacuous else limit
        return [(*map(figure, nats), limit, count(found.n_pairs))]

    headers = (
        "Mean",
        "Upper bound of the mean",
        "99th percentile",
        "Largest",
        "Entropy of the secret",
        "ASR no attacker exceeds",
        "Pairs",
    )
    title = "Certificates: what one draw of the segment can tell at most"
    note = "Figures in nats. A vacuous certificate rules nothing out."
    return _per_guard(report, title, headers, lines, note)


def _detections(report: Report) -> Table:
    def lines(row: GuardRow) -> list[tuple[str, ...]]:
        whole = row.detection
        if whole is None:
            return []
        rest = (whole.task_touched, whole.tokens_flagged, whole.asr_ceiling)
        first = ("all", *_recall(whole), *map(percent, rest))
        empty = ("", "", "")
        return [first, *((name, *_recall(r), *empty) for name, r in whole.categories.items())]

    headers = (
        "Category",
        "Values found",
        "Recall",
        "At least (95%)",
        "Task values touched",
        "Tokens hidden",
        "ASR no attacker exceeds",
    )
    note = (
        "Of guards that find the values themselves, on the records measured here. The last column: "
        "every value that the bound allows to be missed counts as recovered, every other one is "
        "guessed blindly."
    )
    return _per_guard(report, "What the detector finds", headers, lines, note)


def _recall(found: Recall) -> tuple[str, str, str]:
    of = f"{count(found.found)} of {count(found.total)}"
    return of, percent(found.recall), percent(found.recall_lower)


def _policies(report: Report) -> Table:
    headers = (
        "Policy",
        "Forbidden",
        "Utility",
        "Allowed answers",
        "Forbidden recovered",
        "Floor",
        f"Who enumerates {LIST} candidates (chance)",
        "Attempts (success / resisted / error / n.a.)",
    )
    table = Table("Policies", headers)
    for row in report.policies:
        listed = NOT_MEASURED
        if row.listed.model_fields_set:
            asr = percent_ci(row.listed.asr, row.listed.ci)
            listed = f"{asr} ({percent(row.listed.floor)})"
        allowed = percent(row.allowed_accuracy_vanilla)
        table.rows.append(
            (
                row.policy,
                ", ".join(row.forbidden) or "nothing",
                f"{percent(row.utility)} (unguarded: {percent(row.utility_vanilla)})",
                f"{percent(row.allowed_accuracy)} (unguarded: {allowed})",
                percent_ci(row.asr_forbidden, row.asr_forbidden_ci),
                percent(row.floor),
                listed,
                " / ".join(_outcomes(row.counts)) if row.counts else NOT_MEASURED,
            )
        )
    return table


def _derived(report: Report) -> Table:
    headers = (
        "Guard",
        "Policy",
        "Question",
        "From",
        "Right",
        "Right, unguarded",
        "Exact value recovered",
        "Best guess given the derived answer",
    )
    table = Table("Derived answers that stay allowed while the exact value is hidden", headers)
    for row in report.derived:
        names = (row.guard, row.policy, row.question, row.source_category)
        shares = (row.accuracy, row.accuracy_vanilla, row.asr_exact, row.asr_exact_best_guess)
        table.rows.append((*names, *map(percent, shares)))
    return table


def _length_channel(report: Report) -> Table:
    note = "The number of tokens is itself a message: an exact guard still shows it."
    table = Table("Length channel", ("Setting", "ASR"), note=note)
    for key, value in (report.length_channel or {}).items():
        table.rows.append((key.replace("_", " "), percent(value)))
    return table


def provenance(report: Report) -> Table:
    """Where the figures come from: everything that is no result."""
    table = Table("Provenance", ("What", "Value"))
    given = report.plain()
    shown = ("created", "command", "git", "seeds", "model", "data", "hardware", "packages")
    figures = {"results", "policies", "derived", "length_channel", "explained", "curves"}
    known = {"title", "notes", *figures}
    for key in (*shown, *(k for k in given if k not in known and k not in shown)):
        value = given.get(key)
        if value is None or value == {} or value == []:
            text = NOT_MEASURED
        elif isinstance(value, Mapping):
            text = "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
        else:
            text = _plain(value)
        table.rows.append((str(key), text))
    return table


def _plain(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, list | tuple) and not any(isinstance(v, Mapping | list) for v in value):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
