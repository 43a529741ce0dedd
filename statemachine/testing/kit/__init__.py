"""Verify a table and a kernel of your own; none of this knows anything of this protocol.

    homes         where kernels take their tables from: watch or replace them
    reached       what can be reached, the nearest first, with a shortest script to each
    reference     a reference model beside a kernel: the same effects, or a difference
    trial         every event in every snapshot of a kernel; invariants; tours of the rows
    mutants       a table with one edit, and which of them a check does not notice

A table is anything of `compile_table`, a kernel anything with `receive`:

    trial = KernelTrial(Kernel, EVENTS, homes=TableHomes({"lease": (Kernel, "table")}))
    found = trial.explore()                    # raises ViolatingPath with a shortest script
    found.missing(LEASE), found.tour()
    try_mutants(LEASE, trial.homes, trial.explore).survivors

Beside it, `statemachine.testing.induction` proves invariants of any table for any number of steps,
and `transport.testing.virtual` runs a driver in every order of its steps. Chapter 20 verifies a
small machine with all of them.
"""

from __future__ import annotations

from .homes import RowKey, TableHomes, WatchedTable, all_rows, row_key
from .mutants import Mutant, MutantFates, edited, killer_of, mutants, try_mutants
from .reached import Reached, ViolatingPath
from .reference import Difference, Receiver, Reference
from .trial import Exploration, KernelTrial

__all__ = [
    "Difference",
    "Exploration",
    "KernelTrial",
    "Mutant",
    "MutantFates",
    "Reached",
    "Receiver",
    "Reference",
    "RowKey",
    "TableHomes",
    "ViolatingPath",
    "WatchedTable",
    "all_rows",
    "edited",
    "killer_of",
    "mutants",
    "row_key",
    "try_mutants",
]
