"""The part of a campaign that changes tables and code: what notices, and what is no change.

Mutants of the tables are all made and all tried, those with an argument as well. Those of the code
take hours: a campaign tries a sample, all of them from `WHOLE` on, and shows what is kept beside
this file as recorded (`code_mutants`).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from importlib.util import find_spec
from typing import Any, Final

from statemachine.lifecycle import TABLES
from statemachine.table import Table
from statemachine.testing.kit import Mutant, mutants
from tests.campaign import code_mutants
from tests.campaign.mutants import argument_for, killer_of
from tests.campaign.outcome import Discovery, Outcome, Task

MUTANTS: Final = 3_000
"""About how many a task has: each task first tries the tables as they are, for ten seconds."""


SAMPLES: Final = 4
"""Of how many modules a campaign tries mutants of the code, at scale 1."""
SAMPLE: Final = 30
"""How many of such a module."""
WHOLE: Final = 20.0
"""The scale from which on all are tried, of every module: a campaign of a night."""


def tasks(scale: float) -> list[Task]:
    """Every mutant of every table, however much time there is; and of the code's what it allows."""
    found = [
        Task(
            f"{table.name} table, part {part + 1}",
            {"table": table.name, "part": part},
            is_long=True,
        )
        for table in TABLES
        for part in range(_parts_of(table))
    ]
    return [*found, Task("code, as recorded"), *_tasks_of_code(scale)]


def _tasks_of_code(scale: float) -> list[Task]:
    if find_spec("mutmut") is None:  # the extra `mutation` is not installed
        return []
    if scale >= WHOLE:
        names = code_mutants.modules()
        return [Task(f"code of {name}", {"module": name}, is_long=True) for name in names]
    count = max(1, round(SAMPLES * scale))
    return [Task(f"code, sample {n + 1}", {"sample": SAMPLE}, is_long=True) for n in range(count)]


def _parts_of(table: Table) -> int:
    return math.ceil(sum(1 for _ in mutants(table)) / MUTANTS)


def run(
    seed: int, table: str = "", part: int = 0, module: str = "", sample: int | None = None
) -> Outcome:
    """Try a part of a table's mutants, or of the code's; or tell what is recorded of the code's."""
    if module or sample:
        return _code(module or random.Random(seed).choice(code_mutants.modules()), seed, sample)
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


def _code(module: str, seed: int, most: int | None) -> Outcome:
    found = code_mutants.count(module, seed=seed, most=most)
    outcome = Outcome(seconds=found["seconds"])
    _add(outcome, module, found, "sample" if most else "all")
    # What no test notices may change nothing: it is for a reader to say, and no finding by itself.
    outcome.rows += [_row(f"{module}, {said}", Counter(survived=1)) for said in found["survivors"]]
    return outcome


def _recorded() -> Outcome:
    outcome = Outcome()
    for module, said in code_mutants.entries().items():
        _add(outcome, module, said, "recorded")
    return outcome


def _add(outcome: Outcome, module: str, said: dict[str, Any], how: str) -> None:
    tried = said["tried"] - said["untried"]
    count = Counter(killed=said["killed"], survived=tried - said["killed"])
    when = f", {said['date']}, {said['commit']}" if how == "recorded" else ""
    share = f"{tried} of {said['mutants']} tried"
    outcome.rows.append(_row(f"{module} ({how}{when}; {share})", count))
    where = "in kernels" if module.startswith(code_mutants.KERNELS) else "elsewhere"
    for name, number in ((where, tried), (f"{where} killed", said["killed"])):
        key = f"mutants of code {name} ({how})"
        outcome.figures[key] = outcome.figures.get(key, 0) + number


def _row(what: str, count: Counter[str]) -> dict[str, str]:
    return {
        "what is changed": what,
        "mutants": str(count.total()),
        "killed": str(count["killed"]),
        "no change": str(count["equivalent"]),
        "survivors": str(count["survived"]),
    }
