"""No row of any table can be changed in any way unnoticed."""

from __future__ import annotations

from collections import Counter

import pytest

from statemachine.lifecycle import ALLOCATION, CONSUMER, TABLES
from statemachine.table import Table
from tests.campaign import mutants
from tests.campaign.mutants import Mutant, argument_for, killer_of

EDITS = {
    "delete a row",
    "redirect a row",
    "add a row",
    "drop an effect",
    "add an effect",
    "repeat an effect",
    "swap effects",
}


PARTS = 24
"""One part of each table's edits is tried in every run of the tests, all of them in a campaign."""


# One test for all tables, because a process needs ten seconds to try them as they are.
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.deep("mutants") if part else ())
        for part in range(PARTS)
    ],
)
def test_every_edit_of_a_table_is_noticed(part: int) -> None:
    survivors = [
        f"{table.name}: {mutant.name}"
        for table in TABLES
        for mutant in list(mutants.mutants(table))[part::PARTS]
        if argument_for(mutant) is None and killer_of(mutant) is None
    ]
    assert survivors == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_edits_are_of_every_kind_and_each_is_one(table: Table) -> None:
    found = list(mutants.mutants(table))
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
    return sum(mutant.edit == edit for mutant in mutants.mutants(table))
