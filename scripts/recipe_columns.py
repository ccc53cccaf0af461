"""What the table of the gate's recipe and its options shows."""

from __future__ import annotations

from table_columns import Columns, Row, by, cell, figure, plain, text, told


def kept(row: Row) -> str:
    """The share of raw KV's right answers, and what both are."""
    share = row["utility"] / row["utility_vanilla"]
    return f"{figure(share)} ({figure(row['utility'])} of {figure(row['utility_vanilla'])})"


def allowed(row: Row) -> str:
    """The share of allowed secrets that raw KV tells, policy by policy."""
    found = row["allowed"].values()
    return ", ".join(figure(one["accuracy"] / one["vanilla"]) for one in found)


def gate_recipe(report: Row) -> str:
    """The recipe seed by seed, and each option over the same shorter run."""
    columns: Columns = {
        "training": text("name"),
        "task answers kept": kept,
        "fresh ASR [95%]": cell("asr_fresh"),
        "floor": plain("floor"),
        "allowed secrets kept: one category forbidden, three": allowed,
        "pair leak, nats": cell("mean_nats", 2),
        "ceiling of one secret": cell("ceiling"),
        "worst category's": lambda r: told(
            r["ceiling_worst"]["ceiling"], r["ceiling_worst"]["category"]
        ),
        "worst category's fresh ASR": lambda r: told(r["asr_worst_category"], r["worst_category"]),
        "minutes": lambda r: "-" if r["seconds"] is None else figure(r["seconds"] / 60, 0),
    }
    return by(columns, report["rows"])
