"""Cron expressions: what Kubernetes' scheduler takes, and what it would refuse only when applied."""

import pytest

from pipeline.cron import check_cron


@pytest.mark.parametrize(
    "expression", ["0 3 * * *", "*/15 0-6,22 1 jan-mar Mon", "59 23 31 12 0", "0 1-23/2 * * MON-FRI", "5/10 * * * 6"]
)
def test_good_ones_are_taken(expression: str) -> None:
    assert check_cron(expression) == expression


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("@daily", "'@daily' has 1 fields: write minute hour day month weekday"),
        ("0 3 * *", "has 4 fields"),
        ("60 3 * * *", "minute '60' is no value, range or step within 0-59"),
        ("0 3 0 * *", "day '0'"),
        ("0 3 * 13 *", "month '13'"),
        ("0 3 * * 7", "weekday '7'"),
        ("0 3 * * fun", "weekday 'fun'"),
        ("0 9-5 * * *", "hour '9-5'"),
        ("*/0 3 * * *", r"minute '\*/0'"),
        ("0 3, * * *", "hour ''"),
        ("0 -3 * * *", "hour '-3'"),
    ],
)
def test_bad_ones_name_the_field(expression: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_cron(expression)
