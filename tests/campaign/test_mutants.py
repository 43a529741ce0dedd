"""No row of any table can be changed in any way without somebody noticing."""

from __future__ import annotations

from collections import Counter

import pytest

from statemachine.lifecycle import CONSUMER, PROVIDER, TABLES
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


PARTS = 8
"""One part of each table's edits is tried in every run of the tests, all of them in a campaign."""


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.deep("mutants") if part else ())
        for part in range(PARTS)
    ],
)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_edit_of_a_table_is_noticed(table: Table, part: int) -> None:
    survivors = [
        mutant.name
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
    assert count(PROVIDER, "delete a row") == len(PROVIDER.rows)
    assert count(PROVIDER, "redirect a row") == len(PROVIDER.rows) * (len(PROVIDER.states) - 1)
    empty = len(PROVIDER.states) * len(PROVIDER.events) - len(PROVIDER.rows)
    assert count(PROVIDER, "add a row") == empty * len(PROVIDER.states)
    effects = sum(len(row.effects) for row in CONSUMER.rows)
    assert count(CONSUMER, "drop an effect") == effects


def test_a_table_as_it_is_has_no_killer() -> None:
    row = PROVIDER.rows[0]
    assert killer_of(Mutant("provider", "none", "as it is", row, row, PROVIDER.rows)) is None


def count(table: Table, edit: str) -> int:
    return sum(mutant.edit == edit for mutant in mutants.mutants(table))
