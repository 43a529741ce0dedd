"""The figures: what is compared with what, which goal it has, as text, as JSON and as CSV."""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.measures import PARALLEL, TENTHS, Taken
from bench.ratios import Interval, median_interval, p99, pooled, ratio_interval

CREATE_OF_FLOOR: Final = ("create", "floor")
SIGNIFICANT: Final = 4
"""Digits of what is written down."""


class RowGoal(NamedTuple):
    """A bound for a ratio, or for the figure itself if it is compared with nothing."""

    sign: str
    """One of `<=`, `>=` and `>`."""
    bound: float

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"

    def is_reached(self, value: float) -> bool:
        return {"<=": value <= self.bound, ">=": value >= self.bound, ">": value > self.bound}[
            self.sign
        ]


class PlannedRow(NamedTuple):
    """
    One row: a figure of ours, and the same of another.

    The ratio is ours to the other, unless `is_faster`: then it says how many times faster ours is.
    """

    name: str
    ours: tuple[str, str]
    other: tuple[str, str] | None
    goal: RowGoal | None = None
    is_faster: bool = False


@dataclass(frozen=True)
class BenchRow:
    """A row that was made; times in microseconds, unless the name says otherwise."""

    name: str
    against: str
    ours_median: float
    ours_p99: float
    other_median: float | None
    other_p99: float | None
    ratio: float
    low: float
    high: float
    goal: str
    verdict: str


def planned_rows(peers: list[str]) -> list[PlannedRow]:
    """Name all rows, in their order."""
    first, last = "alive, tenth 1", f"alive, tenth {TENTHS}"
    return [
        _against_floor("create", RowGoal("<=", 1.5)),
        _against_floor("release", RowGoal("<=", 2)),
        _against_floor("life"),
        _against_floor("processor"),
        PlannedRow("ask again", ("ask again", "ours"), ("ask again", "socket")),
        PlannedRow("ask again", ("ask again", "ours"), ("ask again", "pool"), RowGoal("<=", 3)),
        PlannedRow("create, kept connection", ("create, kept connection", "ours"), CREATE_OF_FLOOR),
        PlannedRow("life, kept connection", ("life, kept connection", "ours"), ("life", "floor")),
        *(
            PlannedRow(name, (name, "ours"), ("ask again", "pool"), goal)
            for name, goal in (
                ("create from pool", RowGoal("<=", 3)),
                ("create from pool, kept connection", RowGoal("<=", 2)),
            )
        ),
        _against_floor("sustained, a second", RowGoal(">=", 0.8)),
        *(_against_peer(peer) for peer in peers),
        PlannedRow("emptied", ("emptied", "ours"), None, RowGoal("<=", 1000)),
        PlannedRow("spawn", ("spawn", "ours"), ("spawn", "nsenter"), RowGoal("<=", 0.7)),
        PlannedRow(
            "at once, s", ("at once, s", "ours"), ("at once, s", "rate"), RowGoal("<=", 1.5)
        ),
        PlannedRow("at once, unserved", ("at once, unserved", "ours"), None, RowGoal("<=", 0)),
        PlannedRow("alive, last tenth", (last, "ours"), (first, "ours"), RowGoal("<=", 1.2)),
        PlannedRow("alive, last tenth of floor", (last, "floor"), (first, "floor")),
        PlannedRow("idle, wake-ups", ("idle, wake-ups", "ours"), None, RowGoal("<=", 0)),
        PlannedRow("idle, processor", ("idle, processor", "ours"), None),
    ]


def _against_floor(name: str, goal: RowGoal | None = None) -> PlannedRow:
    return PlannedRow(name, (name, "ours"), (name, "floor"), goal)


def _against_peer(peer: str) -> PlannedRow:
    goal = RowGoal(">=", 8) if peer == "crun" else RowGoal(">", 1)
    return PlannedRow("life", ("life", "ours"), ("life", peer), goal, is_faster=True)


def add_derived(taken: Taken, many: int) -> None:
    """Add what follows from other figures: what the sustained rate needs for all at once."""
    rates = pooled(taken.rounds.get(("sustained, a second", "ours"), []))
    served = pooled(taken.rounds.get(("at once, served", "ours"), []))
    for one in served:
        taken.add("at once, unserved", "ours", [many - one])
        if rates:
            taken.add("at once, s", "rate", [many / statistics.median(rates)])


def rows_of(taken: Taken, peers: list[str], seed: int) -> tuple[list[BenchRow], list[str]]:
    """Make all rows, and name those for which something is missing."""
    rows, missing = [], []
    for planned in planned_rows(peers):
        rng = random.Random(f"{seed} {planned.name} {planned.other}")
        try:
            rows.append(_row_of(planned, taken, rng))
        except (ValueError, ZeroDivisionError) as error:
            against = planned.other[1] if planned.other else "nothing"
            missing.append(f"{planned.name} against {against}: {error}")
    return rows, missing


def _row_of(planned: PlannedRow, taken: Taken, rng: random.Random) -> BenchRow:
    ours = taken.rounds.get(planned.ours, [])
    other = taken.rounds.get(planned.other, []) if planned.other else None
    if other is None:
        found = median_interval(ours, rng)
    elif planned.is_faster:
        found = ratio_interval(other, ours, rng)
    else:
        found = ratio_interval(ours, other, rng)
    mine, theirs = pooled(ours), pooled(other or [])
    return BenchRow(
        planned.name,
        planned.other[1] if planned.other else "",
        *(_rounded(measure(mine)) for measure in _MEASURES),
        *(_rounded(measure(theirs)) if theirs else None for measure in _MEASURES),
        *map(_rounded, found),
        goal=str(planned.goal or ""),
        verdict=_verdict(planned.goal, found),
    )


_MEASURES: Final[tuple[Callable[[list[float]], float], ...]] = (statistics.median, p99)


def _verdict(goal: RowGoal | None, found: Interval) -> str:
    if goal is None:
        return ""
    return "reached" if goal.is_reached(found.value) else "NOT reached"


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")


def processor_of(taken: Taken) -> dict[str, dict[str, float]]:
    """Say what processor time a life takes, by process, of ours and of the floor; in us."""
    found: dict[str, dict[str, float]] = {}
    for (name, whose), rounds in taken.rounds.items():
        if name.startswith("processor, "):
            part = name.removeprefix("processor, ")
            found.setdefault(whose, {})[part] = _rounded(statistics.median(pooled(rounds)))
    return found


def alive_of(taken: Taken) -> dict[str, list[float]]:
    """Give the median creation time in each tenth of the allocations that stay alive; in us."""
    names = [f"alive, tenth {tenth + 1}" for tenth in range(TENTHS)]
    return {
        whose: [_rounded(statistics.median(pooled(taken.rounds[name, whose]))) for name in names]
        for whose in ("ours", "floor")
        if all(pooled(taken.rounds.get((name, whose), [])) for name in names)
    }


def write_csv(taken: Taken, path: Path) -> None:
    """Write every value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "whose", "round", "value"])
        for (name, whose), rounds in taken.rounds.items():
            for number, values in enumerate(rounds, 1):
                writer.writerows([name, whose, number, f"{value:.2f}"] for value in values)


# --- as text -----------------------------------------------------------------------------------

HEAD: Final = (
    f"{'':35}{'against':20}{'ours p50':>10}{'p99':>9}{'other p50':>11}{'p99':>9}"
    f"{'ratio':>8}  {'95 %':15}{'goal':8}"
)


def text_of(report: Mapping[str, Any], former: Mapping[str, Any] | None) -> str:
    """Write a report for people; `former` is one to compare it with."""
    lines = [
        f"not measured: {'; '.join(report['not_measured']) or 'nothing is missing'}",
        _circumstances(report["machine"], report["settings"]),
        f"us; 'sustained' is lives a second of {PARALLEL} consumers, 'against' what floor.c and "
        "other programs take",
        HEAD + ("ratio before" if former else ""),
    ]
    before = {(row["name"], row["against"]): row for row in (former or {}).get("rows", [])}
    for row in report["rows"]:
        lines.append(_line(row, before.get((row["name"], row["against"]))))
    lines.append("processor time of a life, us:")
    for whose, parts in report["processor_us"].items():
        lines.append(f"  {whose:6}" + ", ".join(f"{part} {us:g}" for part, us in parts.items()))
    for whose, tenths in report["alive_us"].items():
        shown = " ".join(f"{value:.0f}" for value in tenths)
        lines.append(
            f"creation, in tenths of {report['settings']['many']} alive, {whose}, us: {shown}"
        )
    lines += [f"LEFT: {what}" for what in report["left"]]
    return "\n".join(lines)


def _circumstances(machine: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    cores = f"{len(machine['cores'])} of {machine['all_cores']} cores"
    load = f"load {machine['load_before'][0]} before and {machine['load_after'][0]} after"
    busy = ", so other work was running" if machine["other_work"] else ""
    return (
        f"{machine['processor']}, {cores}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{load}{busy}; {settings['rounds_done']} rounds, seed {settings['seed']}"
    )


def _line(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    other = [_number(row[f"other_{word}"]) for word in ("median", "p99")]
    against, is_alone = row["against"] or "-", row["other_median"] is None
    ratio = "-" if is_alone else f"{row['ratio']:.2f}"
    interval = f"{_short(row['low'])} to {_short(row['high'])}"
    line = (
        f"{row['name']:35}{against:20}{_number(row['ours_median']):>10}"
        f"{_number(row['ours_p99']):>9}{other[0]:>11}{other[1]:>9}{ratio:>8}  {interval:15}"
        f"{row['goal']:8}{row['verdict']:12}"
    )
    if before is not None:
        change = row["ratio"] / before["ratio"] - 1 if before["ratio"] else 0.0
        line += f"{_short(before['ratio'])} ({change:+.0%})"
    return line.rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:.1f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def as_plain(rows: list[BenchRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
