"""What the table of rounds against attackers shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from table_columns import Columns, Row, by, figure, text


def over_seeds(rows: Sequence[Row], key: str) -> str:
    """The mean over trainings, and the lowest and highest where there are several."""
    values = [row[key] for row in rows]
    mean = figure(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({figure(min(values))} to {figure(max(values))})"


def spread(key: str) -> Callable[[Row], str]:
    return lambda row: over_seeds(row["trainings"], key)


def counts(part: str, whole: str) -> Callable[[Row], str]:
    """Of each training."""
    return lambda row: (
        ", ".join(str(t[part]) for t in row["trainings"]) + (f" of {row['trainings'][0][whole]}")
    )


def mined(row: Row) -> str:
    """Of each round, over all trainings, the share of values recovered that were asked about."""
    rounds: dict[int, list[Row]] = {}
    for training in row["trainings"]:
        for entry in training["rounds"]:
            if entry["asked"]:
                rounds.setdefault(entry["round"], []).append(entry)
    shares = [
        sum(e["recovered"] for e in entries) / sum(e["asked"] for e in entries)
        for _, entries in sorted(rounds.items())
    ]
    return ", ".join(map(figure, shares)) or "-"


def taken_back(row: Row) -> str:
    entries = [e for t in row["trainings"] for e in t["rounds"] if e["round"]]
    return f"{sum(e['rolled_back'] for e in entries)} of {len(entries)}" if entries else "-"


def attacked_rounds(report: Row) -> str:
    """Each option beside the rounds without it, and one fit on all records."""
    trainings: dict[str, list[Row]] = {}
    for row in report["rows"]:
        trainings.setdefault(row["name"], []).append(row)
    columns: Columns = {
        "training": text("name"),
        "values found": counts("found", "total"),
        "recall": spread("recall"),
        "at least, 95%": spread("recall_lower"),
        "task spans touched": spread("task_touched"),
        "recovered by a fresh `inversion`": counts("recovered", "asked"),
        "recovered in each round": mined,
        "rounds taken back": taken_back,
    }
    return by(columns, [{"name": name, "trainings": own} for name, own in trainings.items()])
