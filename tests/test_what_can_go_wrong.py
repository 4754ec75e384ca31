"""docs/what-can-go-wrong.md names, for every row, the test that does what the row says."""

import pytest

from named_tests import TESTS, missing_in, rows_of

PAGE = TESTS.parent / "docs" / "what-can-go-wrong.md"
VERDICTS = ("Right", "Refused", "Noticed")
HEAD = "| you do | what happens | what to do instead | test |"


def wrong_in(row: list[str]) -> str | None:
    """What is wrong with one row, or None."""
    if len(row) != 4:
        return f"has {len(row)} cells, not 4"
    if not row[1].startswith(VERDICTS):
        return f"begins with none of {', '.join(VERDICTS)}: {row[1]!r}"
    if row[1].startswith(VERDICTS[1:]) and not row[2]:
        return "says no way out"
    missing = missing_in(row[3])
    return None if missing is None else f"names no test: {missing!r}"


def test_every_row_of_the_page_names_a_test_that_is_there() -> None:
    rows = rows_of(PAGE.read_text(), HEAD)
    assert rows
    assert [(row, wrong) for row in rows if (wrong := wrong_in(row))] == []


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (["a", "Right", "", "`test_size::test_nowhere`"], "names no test"),
        (["a", "Right", "", "`test_nowhere::test_x`"], "names no test"),
        (["a", "Refused", "", "`test_size::test_no_file_and_no_function_is_too_long`"], "way out"),
        (["a", "Maybe", "b", "`test_size::test_no_file_and_no_function_is_too_long`"], "none of"),
        (["a", "Right", ""], "3 cells"),
    ],
)
def test_a_row_that_is_not_true_is_found(row: list[str], wrong: str) -> None:
    assert wrong in str(wrong_in(row))
