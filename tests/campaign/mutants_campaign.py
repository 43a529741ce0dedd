"""The part of a campaign that changes tables and code: what notices, and what is no change.

Mutants of the tables are all made and all tried, those with an argument as well. Mutants of the
code take an hour; what the last run of mutmut said is kept beside this file and shown as recorded.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Final

from statemachine.lifecycle import TABLES
from statemachine.table import Table
from statemachine.testing.kit import Mutant, mutants
from tests.campaign.mutants import argument_for, killer_of
from tests.campaign.outcome import Discovery, Outcome, Task

RECORD: Final = Path(__file__).with_name("mutants_recorded.json")
"""Module -> how many mutants of its code there were, and how many were killed."""

MUTANTS: Final = 3_000
"""About how many a task has: each task first tries the tables as they are, for ten seconds."""


def tasks(scale: float) -> list[Task]:
    """Every mutant of every table, however much time there is; and the record of the code's."""
    found = [
        Task(
            f"{table.name} table, part {part + 1}",
            {"table": table.name, "part": part},
            is_long=True,
        )
        for table in TABLES
        for part in range(_parts_of(table))
    ]
    return [*found, Task("code, as recorded", {"table": "", "part": 0})]


def _parts_of(table: Table) -> int:
    return math.ceil(sum(1 for _ in mutants(table)) / MUTANTS)


def run(seed: int, table: str, part: int) -> Outcome:
    """Try a part of a table's mutants; or tell what is recorded of the code's."""
    if not table:
        return _recorded()
    start = time.perf_counter()
    original = next(each for each in TABLES if each.name == table)
    outcome = Outcome()
    counts: dict[str, Counter[str]] = {}
    for mutant in list(mutants(original))[part :: _parts_of(original)]:
        counts.setdefault(mutant.edit, Counter())[_fate(mutant, outcome)] += 1
    for edit, count in sorted(counts.items()):
        outcome.rows.append(_row(f"{table} table, part {part + 1}: {edit}", count))
    total = sum(counts.values(), Counter())
    outcome.figures = {
        "mutants of tables": total.total(),
        "mutants of tables killed": total["killed"],
        "mutants of tables argued": total["equivalent"],
    }
    outcome.seconds = time.perf_counter() - start
    return outcome


def _fate(mutant: Mutant, outcome: Outcome) -> str:
    if killer_of(mutant) is not None:
        return "killed"
    if argument_for(mutant) is not None:
        return "equivalent"
    title = f"nothing notices that in the {mutant.table} table {mutant.name}"
    outcome.discoveries.append(
        Discovery(title, "nshandoff verify --part mutants", culprit="campaign")
    )
    return "survived"


def _recorded() -> Outcome:
    record: dict[str, dict[str, int]] = json.loads(RECORD.read_text(encoding="utf-8"))
    outcome = Outcome()
    for module, said in record.items():
        count = Counter(killed=said["killed"], survived=said["mutants"] - said["killed"])
        outcome.rows.append(_row(f"{module} (recorded)", count))
        for name, number in (("of code", count.total()), ("of code killed", count["killed"])):
            key = f"mutants {name} (recorded)"
            outcome.figures[key] = outcome.figures.get(key, 0) + number
    return outcome


def _row(what: str, count: Counter[str]) -> dict[str, str]:
    return {
        "what is changed": what,
        "mutants": str(count.total()),
        "killed": str(count["killed"]),
        "no change": str(count["equivalent"]),
        "survivors": str(count["survived"]),
    }
