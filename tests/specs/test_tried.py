"""What was tried: each row of chapter 19 has an answer, and the test that shows it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from specs._build.clauses import ROOT

CHAPTER: Final = ROOT / "specs" / "19-tried.md"
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
COLUMNS: Final = ["kind", "smallest input", "today", "answer", "test"]
ANSWERS: Final = re.compile(r"works|refused in words|decided no: \[.+\]\(.+\)|open: .+")


class TriedCase(NamedTuple):
    """A case."""

    kind: str
    smallest_input: str
    today: str
    answer: str
    tests: str


def rows_of(text: str) -> list[TriedCase]:
    """Read the tables; a row with more or fewer cells is an error."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines]
    return [TriedCase(*row) for row in cells if row != COLUMNS and row[0].strip("-")]


def faults_of(row: TriedCase) -> list[str]:
    """Say what is wrong with a row."""
    faults = [] if ANSWERS.fullmatch(row.answer) else [f"no answer: {row.answer}"]
    named = re.findall(r"`([^`]+)`", row.tests)
    faults += [f"no such test: {name}" for name in named if not is_test(name)]
    if not named and row.answer.startswith(("works", "refused")):
        faults.append("no test shows it")
    return faults


def is_test(name: str) -> bool:
    """Say whether a file, below `tests` or of a kit, has this test."""
    file, _, function = name.partition("::")
    path = next((p for p in (ROOT / "tests" / file, ROOT / file) if p.is_file()), None)
    return path is not None and function in names_in(path)


def names_in(path: Path) -> set[str]:
    """Find the tests of a file, those in classes included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = (node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
    return {name for name in names if name.startswith("test_")}


ROWS: Final = rows_of(CHAPTER.read_text(encoding="utf-8"))


def test_basic_there_are_tables() -> None:
    assert len(ROWS) > 60
    assert {row.answer.partition(":")[0] for row in ROWS} == {
        "works",
        "refused in words",
        "decided no",
        "open",
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_a_row_has_an_answer_and_the_test_that_shows_it(row: TriedCase) -> None:
    assert faults_of(row) == []


@pytest.mark.parametrize(
    ("answer", "tests", "fault"),
    [
        ("perhaps", "", "no answer: perhaps"),
        ("decided no: because", "", "no answer: decided no: because"),
        ("works", "", "no test shows it"),
        ("refused in words", "a test", "no test shows it"),
        ("open: later", "`specs/test_tried.py::test_absent`", "no such test: "),
        ("works", "`specs/absent.py::test_basic_there_are_tables`", "no such test: "),
        ("works", "`specs/test_tried.py::rows_of`", "no such test: "),
    ],
)
def test_what_is_wrong_with_a_row_is_named(answer: str, tests: str, fault: str) -> None:
    (row,) = rows_of(f"| kind | input | today | {answer} | {tests} |")
    assert [found for found in faults_of(row) if found.startswith(fault)] != []


def test_an_answer_that_is_shown_is_accepted() -> None:
    shown = "`specs/test_tried.py::test_basic_there_are_tables`"
    (row,) = rows_of(rf"| kind | `a \| b` | today | works | {shown} |")
    assert faults_of(row) == []
