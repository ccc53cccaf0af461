"""The tables of a report, once for Markdown and HTML; every figure is read from the dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcguard.evaluation.intervals import zero_success_caveat
from lcguard.evaluation.verdict import (
    LIST,
    NOT_MEASURED,
    RULE,
    count,
    figure,
    from_list,
    interval,
    mapping,
    number,
    percent,
    percent_ci,
    records,
    utility_share,
    verdict,
)


@dataclass(frozen=True)
class Table:
    """Headers and rows of plain text; the writers escape it."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


def overview(report: Mapping[str, Any]) -> Table:
    """The table that opens the report."""
    table = Table(
        "At a glance",
        (
            "Guard",
            "Can the receiver still do its job?",
            "What a fresh attacker recovers",
            "If it knew nothing (floor)",
            f"Who enumerates {LIST} candidates",
            "Verdict",
        ),
        note=f"Rule: {RULE}",
    )
    for row in records(report.get("results")):
        judged, share = verdict(row), utility_share(row)
        job = NOT_MEASURED if share is None else f"{share:.1%} of unguarded"
        if number(row.get("utility")) is not None:
            job += f" ({figure(row['utility'])} against {figure(row.get('utility_vanilla'))})"
        asr = percent_ci(row.get("asr_fresh"), row.get("asr_fresh_ci"))
        table.rows.append(
            (
                str(row.get("guard", "?")),
                job,
                asr,
                percent(row.get("floor")),
                percent_ci(from_list(row).get("asr"), from_list(row).get("ci")),
                f"{judged.word}: {judged.reason}",
            )
        )
    return table


def details(report: Mapping[str, Any]) -> list[Table]:
    """All other tables, those without rows included: the writers say so."""
    results = records(report.get("results"))
    tables = [_attackers(results), _attempts(results), _by_attack(results), _by_category(results)]
    tables.append(_lists(results))
    tables += [_cost(results), _certificates(results), _policies(report), _derived(report)]
    return [*tables, _length_channel(report)]


def _attackers(results: list[Mapping[str, Any]]) -> Table:
    table = Table(
        "Attackers, from the one the guard was trained against to the strongest",
        (
            "Guard",
            "Training-time ASR",
            "Fresh ASR",
            "Advantage over floor",
            "Any of k",
            "Prompt injection",
            "Floor",
            "Ceiling (no guard)",
        ),
        note="Fresh: trained from scratch after the guard was frozen, knowing it. Any of k: share "
        "of secrets that at least one attack or seed recovered. Intervals at 95%.",
    )
    for row in results:
        keys = ("advantage", "any_of_k", "asr_injection", "floor", "ceiling")
        fresh = percent_ci(row.get("asr_fresh"), row.get("asr_fresh_ci"))
        cells = [str(row.get("guard", "?")), percent(row.get("asr_train")), fresh]
        table.rows.append((*cells, *(percent(row.get(k)) for k in keys)))
    return table


def _attempts(results: list[Mapping[str, Any]]) -> Table:
    headers = ("Guard", "Success", "Resisted", "Error", "Not applicable", "Caveat")
    note = "ASR = success / (success + resisted). Errors never count for the guard."
    table = Table("Attempts", headers, note=note)
    for row in results:
        found = mapping(row.get("counts"))
        keys = ("success", "resisted", "error", "not_applicable")
        won, lost = number(found.get("success")), number(found.get("resisted"))
        caveat = None
        if won is not None and lost is not None:
            caveat = zero_success_caveat(int(won), int(won + lost))
        cells = (str(row.get("guard", "?")), *(count(found.get(k)) for k in keys))
        table.rows.append((*cells, caveat or "none"))
    return table


def _by_attack(results: list[Mapping[str, Any]]) -> Table:
    headers = ("Guard", "Attack", "ASR", "Token accuracy", "Cross-entropy gap")
    table = Table("Fresh attackers one by one", headers)
    for row in results:
        for name, given in mapping(row.get("asr_fresh_by_attack")).items():
            found = given if isinstance(given, Mapping) else {"asr": given}
            cells = (str(row.get("guard", "?")), str(name))
            asr = percent_ci(found.get("asr"), found.get("ci"))
            gap = figure(found.get("ce_gap_nats"), "nats")
            table.rows.append((*cells, asr, percent(found.get("token_accuracy")), gap))
    return table


def _by_category(results: list[Mapping[str, Any]]) -> Table:
    headers = ("Guard", "Category", "ASR", "Wilson", "Bootstrap", "Floor", "Ceiling", "n")
    table = Table("Fresh ASR per category", headers)
    for row in results:
        for name, given in mapping(row.get("asr_by_category")).items():
            found = mapping(given)
            cells = [str(row.get("guard", "?")), str(name), percent(found.get("asr"))]
            for key in ("wilson", "bootstrap"):
                ci = interval(found.get(key))
                cells.append(f"{ci[0]:.1%} to {ci[1]:.1%}" if ci else NOT_MEASURED)
            cells += [percent(found.get("floor")), percent(found.get("ceiling"))]
            table.rows.append((*cells, count(found.get("n"))))
    return table


def _lists(results: list[Mapping[str, Any]]) -> Table:
    table = Table(
        "The optimal attacker, who chooses from a list of candidates",
        (
            "Guard",
            "Candidates",
            "ASR",
            "Chance",
            "Blind",
            "Median rank",
            "Gained",
            "By the length alone",
            "Lists that are shorter",
            "n",
        ),
        note="By the exact likelihood of the segment, knowing model, guard and the rest of the "
        "record. Chance: 1 over the candidates really in the list, all of the true value's length. "
        "Blind: the same attack on segments of other records. Gained: nats over the prior.",
    )
    for row in results:
        found = mapping(row.get("likelihood"))
        length = figure(found.get("length_nats"), "nats")
        for size, given in found.items():
            if not isinstance(given, Mapping):
                continue
            cells = [
                str(row.get("guard", "?")),
                size,
                percent_ci(given.get("asr"), given.get("ci")),
            ]
            cells += [percent(given.get("floor")), percent(given.get("blind"))]
            cells += [figure(given.get("rank_median")), figure(given.get("nats"), "nats"), length]
            cells += [percent(given.get("shorter")), count(given.get("n"))]
            table.rows.append(tuple(cells))
    return table


def _cost(results: list[Mapping[str, Any]]) -> Table:
    table = Table("Cost", ("Guard", "Prefill", "Guard itself", "Bytes that travel", "Note"))
    for row in results:
        ms = mapping(row.get("latency_ms"))
        times = (figure(ms.get("prefill"), "ms"), figure(ms.get("guard"), "ms"))
        cells = (*times, percent(row.get("bytes_share")), str(row.get("note") or "none"))
        table.rows.append((str(row.get("guard", "?")), *cells))
    return table


def _certificates(results: list[Mapping[str, Any]]) -> Table:
    table = Table(
        "Certificates: what one draw of the segment can tell at most",
        (
            "Guard",
            "Mean",
            "Upper bound of the mean",
            "99th percentile",
            "Largest",
            "Entropy of the secret",
            "ASR no attacker exceeds",
            "Pairs",
        ),
        note="Figures in nats. A vacuous certificate rules nothing out.",
    )
    keys = ("mean_nats", "upper_nats", "p99_nats", "max_nats", "entropy_nats")
    for row in results:
        found = mapping(row.get("certificate"))
        if not found:
            continue
        limit = percent(found.get("asr_ceiling"))
        if found.get("vacuous"):
            limit = f"vacuous ({limit})"
        cells = [str(row.get("guard", "?")), *(figure(found.get(k)) for k in keys)]
        table.rows.append((*cells, limit, count(found.get("n_pairs"))))
    return table


def _policies(report: Mapping[str, Any]) -> Table:
    headers = ("Policy", "Forbidden", "Utility", "Allowed answers", "Forbidden recovered", "Floor",
               f"Who enumerates {LIST} candidates (chance)")  # fmt: skip
    table = Table("Policies", (*headers, "Attempts (success / resisted / error / n.a.)"))
    for row in records(report.get("policies")):
        forbidden = row.get("forbidden")
        names = ", ".join(map(str, forbidden)) if isinstance(forbidden, list | tuple) else ""
        pairs = []
        for key in ("utility", "allowed_accuracy"):
            own, vanilla = percent(row.get(key)), percent(row.get(f"{key}_vanilla"))
            pairs.append(f"{own} (unguarded: {vanilla})")
        found = mapping(row.get("counts"))
        kinds = ("success", "resisted", "error", "not_applicable")
        tried = " / ".join(count(found.get(k)) for k in kinds) if found else NOT_MEASURED
        asr = percent_ci(row.get("asr_forbidden"), row.get("asr_forbidden_ci"))
        cells = (str(row.get("policy", "?")), names or "nothing", *pairs, asr)
        picked = from_list(row)
        asr = percent_ci(picked.get("asr"), picked.get("ci"))
        listed = f"{asr} ({percent(picked.get('floor'))})" if picked else NOT_MEASURED
        table.rows.append((*cells, percent(row.get("floor")), listed, tried))
    return table


def _derived(report: Mapping[str, Any]) -> Table:
    headers = ("Guard", "Policy", "Question", "From", "Right", "Right, unguarded")
    table = Table(
        "Derived answers that stay allowed while the exact value is hidden",
        (*headers, "Exact value recovered", "Best guess given the derived answer"),
    )
    keys = ("accuracy", "accuracy_vanilla", "asr_exact", "asr_exact_best_guess")
    for row in records(report.get("derived")):
        names = (str(row.get(k, "?")) for k in ("guard", "policy", "question", "source_category"))
        table.rows.append((*names, *(percent(row.get(k)) for k in keys)))
    return table


def _length_channel(report: Mapping[str, Any]) -> Table:
    note = "The number of tokens is itself a message: an exact guard still shows it."
    table = Table("Length channel", ("Setting", "ASR"), note=note)
    for key, value in mapping(report.get("length_channel")).items():
        table.rows.append((str(key).replace("_", " "), percent(value)))
    return table


def provenance(report: Mapping[str, Any]) -> Table:
    """Where the figures come from: everything that is no result."""
    table = Table("Provenance", ("What", "Value"))
    shown = ("created", "command", "git", "seeds", "model", "data", "hardware", "packages")
    known = {"title", "results", "policies", "derived", "length_channel", "explained", "notes"}
    for key in (*shown, *(k for k in report if k not in known and k not in shown)):
        value = report.get(key)
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
