"""When a reply says a value, and when it only holds its characters."""

from __future__ import annotations

import pytest

from lcguard.evaluation.said import says


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("The patient's SSN is 912-55-1029.", "912-55-1029"),
        ("It is 912 55 1029", "912-55-1029"),
        ("Retainer: 102,968 dollars", "102968"),
        ("She complains of Back  Pain, mostly", "back pain"),
        ("born on March 5, 1984", "1984-03-05"),
        ("born on 5 March 1984.", "1984-03-05"),
        ("03/05/1984", "1984-03-05"),
        ("**Ada Long**", "Ada Long"),
        ("\uff21da Long is her name", "Ada Long"),
        ("The total is 12.", "12"),
    ],
)
def test_said(reply: str, value: str) -> None:
    assert says(reply, value)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("in 2012", "12"),
        ("It costs 1,120.12 dollars", "12"),
        ("It costs 12.50 dollars", "12"),
        ("her name is Adalong", "Ada"),
        ("born on March 6, 1984", "1984-03-05"),
        ("I cannot say.", "not stated"),
        ("", "x"),
        ("anything", " "),
    ],
)
def test_not_said(reply: str, value: str) -> None:
    assert not says(reply, value)
