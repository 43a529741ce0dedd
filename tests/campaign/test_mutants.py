"""The edits of a table are of every kind, and one that changes nothing has no killer."""

from __future__ import annotations

from collections import Counter

import pytest

from statemachine.lifecycle import ALLOCATION, CONSUMER, TABLES
from statemachine.table import Table
from statemachine.testing.kit import Mutant, mutants
from tests.campaign.mutants import killer_of

EDITS = {
    "delete a row",
    "redirect a row",
    "add a row",
    "drop an effect",
    "add an effect",
    "repeat an effect",
    "swap effects",
}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_edits_are_of_every_kind_and_each_is_one(table: Table) -> None:
    found = list(mutants(table))
    assert {mutant.edit for mutant in found} == EDITS
    assert Counter(mutant.name for mutant in found).most_common(1)[0][1] == 1
    for mutant in found:
        changed = set(mutant.rows) ^ set(table.rows)
        assert changed == {mutant.before, mutant.after} - {None}


def test_rows_are_edited_completely() -> None:
    assert count(ALLOCATION, "delete a row") == len(ALLOCATION.rows)
    assert count(ALLOCATION, "redirect a row") == len(ALLOCATION.rows) * (
        len(ALLOCATION.states) - 1
    )
    empty = len(ALLOCATION.states) * len(ALLOCATION.events) - len(ALLOCATION.rows)
    assert count(ALLOCATION, "add a row") == empty * len(ALLOCATION.states)
    effects = sum(len(row.effects) for row in CONSUMER.rows)
    assert count(CONSUMER, "drop an effect") == effects


@pytest.mark.deep("long")
def test_a_table_as_it_is_has_no_killer() -> None:
    row = ALLOCATION.rows[0]
    assert killer_of(Mutant("allocation", "none", "as it is", row, row, ALLOCATION.rows)) is None


def count(table: Table, edit: str) -> int:
    return sum(mutant.edit == edit for mutant in mutants(table))
