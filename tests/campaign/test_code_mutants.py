"""A mutant of the code is put in place of what runs, and tried with the tests of its line."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from tests.campaign import code_mutants, mutants_campaign
from tests.campaign.canaries_tree import ROOT
from tests.campaign.code_mutants_run import _chosen, _in_fork, _put

SOURCE = """\
from functools import cache

LIMIT = 3


@cache
def double(x):
    return x * 2


class Counter:
    start = 1

    @property
    def next(self):
        return self.start + 1

    def adder(self):
        def add(x):
            return self.start + x
        return add
"""


def loaded() -> tuple[dict[str, Any], list[FunctionType]]:
    names: dict[str, Any] = {}
    exec(compile(SOURCE, "mutated.py", "exec"), names)
    methods = [names["Counter"].next.fget, names["Counter"].adder]
    return names, [names["double"].__wrapped__, *methods]


@pytest.mark.parametrize(
    ("before", "after", "call", "says"),
    [
        ("x * 2", "x * 3", lambda names: names["double"](2), 6),
        ("start + 1", "start - 1", lambda names: names["Counter"]().next, 0),
        ("start + x", "start - x", lambda names: names["Counter"]().adder()(5), -4),
    ],
)
def test_the_code_of_what_is_there_changes(
    before: str, after: str, call: Callable[[Any], int], says: int
) -> None:
    names, functions = loaded()
    assert _put("mutated.py", functions, SOURCE, SOURCE.replace(before, after))
    assert call(names) == says


@pytest.mark.parametrize(("before", "after"), [("LIMIT = 3", "LIMIT = 4"), ("t = 1", "t = 2")])
def test_what_runs_on_import_is_not_taken_for_tried(before: str, after: str) -> None:
    _, functions = loaded()
    assert not _put("mutated.py", functions, SOURCE, SOURCE.replace(before, after))


def test_a_line_is_tried_with_its_tests_the_quickest_first_and_not_all_day() -> None:
    known = {"slow": (9.0, [1, 2]), "quick": (0.1, [2]), "other": (0.2, [1]), "away": (0.1, [])}
    assert _chosen(known, 2) == (["quick", "slow"], pytest.approx(9.1))
    assert _chosen({**known, "late": (9.5, [2])}, 2)[0] == ["quick", "slow"]
    assert _chosen(known, 7) == (["away"], 0.1)


def test_a_mutant_that_hangs_or_dies_is_no_survivor() -> None:
    assert _in_fork(lambda: 0, 10.0) == 0
    assert _in_fork(lambda: 1, 10.0) == 1
    assert _in_fork(lambda: time.sleep(60) or 0, 0.1) < 0


def test_the_modules_are_those_that_decide_and_each_has_tests() -> None:
    names = code_mutants.modules()
    assert {"transport/channel.py", "transport/serve/peers.py", "linux/cgroups.py"} <= set(names)
    assert not [name for name in names if "/testing/" in name or "/demo/" in name]
    assert [name for name in names if not code_mutants.tests_of(name)] == []
    assert code_mutants.tests_of("linux/journal.py")[0] == "tests/linux/test_journal.py"


def test_what_is_recorded_says_when_and_of_what() -> None:
    entries = code_mutants.entries()
    assert set(entries) <= set(code_mutants.modules()) | {"statemachine/exports.py"}
    for said in entries.values():
        assert said["killed"] + said["untried"] <= said["tried"] <= said["mutants"]
        assert said["date"]
        assert said["commit"]
    outcome = mutants_campaign.run(0)
    recorded = [row["what is changed"] for row in outcome.rows]
    assert len(recorded) == len(entries)
    assert all("recorded, 20" in what for what in recorded)


def test_mutmut_finds_what_it_looks_for_when_it_is_imported() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["mutmut"]["source_paths"] == list(code_mutants.PACKAGES)
