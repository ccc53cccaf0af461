"""Columns of tables about the real model."""

from __future__ import annotations

from table_columns import GUARDS, UTILITY, Columns, Row, by, by_attack, cell, plain, text


def single_pass(report: Row) -> str:
    """Guards of one prefill beside those of two."""
    columns: Columns = {
        "guard": text("guard"),
        **UTILITY,
        "injection": cell("asr_injection"),
        **{n: lambda r, n=n: by_attack(r, n) for n in ("probe", "tuned-receiver")},
        "floor": plain("floor"),
        "recovered / resisted": GUARDS["recovered / resisted"],
    }
    return by(columns, report["results"])
