"""The report page's style sheet: system fonts, light and dark, readable at 360 px."""

from __future__ import annotations

from pathlib import Path

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
