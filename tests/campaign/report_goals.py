"""The figures that a campaign is to reach, and whether it did.

A figure is looked for where its part shows it, and one that is not there was not measured:

    explore       rows: space, worlds, moves, seconds, worlds a second, complete
    open          figures: kernel snapshots, kernel steps
    virtual       figures: orders of steps
    faults        figures: single faults, single faults there are, pairs
                  rows: call, outcomes ("served x 3, refused x 5")
    differential  figures: programs, of each family; those over whole backends
    canaries      figures: canaries, survived              rows: canary, layer, seconds
    catches       rows: bug, layer, caught
    mutants       figures: mutants of tables; of code, in kernels and elsewhere, tried and killed
    rates         figures: events through the kernel, trace events checked, CPU seconds of each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tests.campaign.report_catches import idle, uncaught
from tests.campaign.report_summary import LEGAL, LIVES, OWED, Part, Summary, number_in

RATES_A_SECOND: Final = {"events through the kernel": 100_000.0, "trace events checked": 50_000.0}
STATES: Final = 200_000
STATES_S: Final = 60.0
STATES_A_SECOND: Final = STATES / STATES_S
SNAPSHOTS: Final = 50_000
STEPS: Final = 500_000
ORDERS: Final = 5_000
PAIRS: Final = 50_000
PROGRAMS: Final = 100_000
BACKEND_PROGRAMS: Final = 20_000
CODE_MUTANTS_SHARES: Final = {"in kernels": 0.98, "elsewhere": 0.95}
"""How many of the mutants of the code are to be killed, by where they are."""
KILL_TIMES_S: Final = {"explorer": 1.0, "stateful": 10.0}
"""How long the layer that should catch a canary may take."""
CANARIES: Final = 100
STATEFUL: Final = "stateful machine"
STATEFUL_SHARE: Final = 0.25
"""Of the planted bugs, most of which are in consumers, tables, codecs and forges."""

ADAPTERS: Final = ("model", "kernels", "simulated", "linux")
"""Those of ours, which are to hit every cell."""


class GoalStatus(Enum):
    """What became of a goal."""

    REACHED = "reached"
    NOT_REACHED = "not reached"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A figure to be reached."""

    figure: str
    goal: str
    reached: str
    verdict: GoalStatus
    is_promise: bool = False
    """Whether the campaign fails with it."""


def goals_of(summary: Summary) -> list[Goal]:
    """Hold a campaign to every goal, in the order in which they are read."""
    explore = summary.parts.get("explore", Part("explore"))
    open_ = summary.parts.get("open", Part("open"))
    virtual = summary.parts.get("virtual", Part("virtual"))
    faults = summary.parts.get("faults", Part("faults"))
    mutants = summary.parts.get("mutants", Part("mutants"))
    return [
        _states_in_time(explore),
        _full_space(explore),
        _at_least(open_, "distinct kernel snapshots, beside the model", ("snapshots",), SNAPSHOTS),
        _at_least(open_, "distinct kernel steps, beside the model", ("steps",), STEPS),
        _at_least(virtual, "orders of drivers' steps", ("orders",), ORDERS),
        *_rates(summary.parts.get("rates", Part("rates"))),
        *_cells(summary),
        _single_faults(faults),
        _at_least(faults, "pairs of faults", ("pair",), PAIRS),
        *_programs(summary.parts.get("differential", Part("differential"))),
        *_canaries(summary.parts.get("canaries", Part("canaries"))),
        *_catches(summary.parts.get("catches", Part("catches"))),
        _killed(mutants, "table mutants killed", ("table",), 1.0),
        *_code_mutants(mutants),
    ]


def is_good(summary: Summary) -> bool:
    """Say whether nothing was found and every promise was kept."""
    broken = [g for g in goals_of(summary) if g.is_promise and g.verdict is GoalStatus.NOT_REACHED]
    return not summary.found and not broken


# --- Looking for figures -----------------------------------------------------------------------


def figure(part: Part, *words: str, without: tuple[str, ...] = ()) -> float | None:
    """Sum the figures of a part whose names have all these words; None if there is none."""
    found = [
        count
        for name, count in part.figures.items()
        if all(word in name.lower() for word in words)
        and not any(word in name.lower() for word in without)
    ]
    return sum(found) if found else None


def column(row: Mapping[str, str], *words: str) -> float | None:
    """Read the number in the first column whose name has one of some words."""
    for word in words:
        for name, said in row.items():
            if word in name.lower() and number_in(said) is not None:
                return number_in(said)
    return None


# --- The goals ---------------------------------------------------------------------------------


def _judge(
    figure: str, goal: str, reached: str, is_reached: bool | None, *, is_promise: bool = False
) -> Goal:
    if is_reached is None:
        return Goal(figure, goal, "", GoalStatus.NOT_MEASURED, is_promise)
    verdict = GoalStatus.REACHED if is_reached else GoalStatus.NOT_REACHED
    return Goal(figure, goal, reached, verdict, is_promise)


def _at_least(part: Part, name: str, words: tuple[str, ...], least: float) -> Goal:
    count = figure(part, *words)
    is_reached = None if count is None else count >= least
    return _judge(name, f"≥ {least:,.0f}", f"{count or 0:,.0f}", is_reached)


def _single_faults(faults: Part) -> Goal:
    name, goal = "single faults, of calls by documented errnos", "100%"
    done, whole = (faults.figures.get(f"single faults{more}") for more in ("", " there are"))
    if done is None:
        return _judge(name, goal, "", None)
    if whole is None:
        said = f"{done:,.0f}; how many there are is not said"
        return Goal(name, goal, said, GoalStatus.NOT_MEASURED)
    return _judge(name, goal, f"{done / whole:.2%}: {done:,.0f} of {whole:,.0f}", done >= whole)


def _killed(part: Part, name: str, words: tuple[str, ...], least: float) -> Goal:
    """Compare `… killed` with what there is, `…`; those that are argued are said."""
    done = figure(part, *words, "killed")
    argued = figure(part, *words, "argued") or 0.0
    whole = figure(part, *words, without=("killed", "argued", "survived", "seconds"))
    goal = f"{'' if least == 1 else '≥ '}{least:.0%}"
    if done is None or not whole:
        return _judge(name, goal, "", None)
    said = f"{done / whole:.2%}: {done:,.0f} of {whole:,.0f}"
    said += f", {argued:,.0f} argued" if argued else ""
    # What changes nothing cannot be killed: where all are asked for, all others are.
    return _judge(name, goal, said, (done + argued * (least == 1)) / whole >= least)


def _code_mutants(mutants: Part) -> Iterator[Goal]:
    """Samples and earlier runs are no measurement of all there is: they are only said."""
    for where, least in CODE_MUTANTS_SHARES.items():
        name = f"code mutants killed, {where}"
        whole = _killed(mutants, name, ("code", where, "(all)"), least)
        others = [
            f"{how}: {part.reached}"
            for how in ("recorded", "sample")
            if (part := _killed(mutants, name, ("code", where, f"({how})"), least)).reached
        ]
        if whole.verdict is GoalStatus.NOT_MEASURED and others:
            yield Goal(name, whole.goal, "; ".join(others), GoalStatus.NOT_MEASURED)
        else:
            yield whole


def _states_in_time(explore: Part) -> Goal:
    name, goal = (
        "distinct worlds: kernels, connections and node",
        f"≥ {STATES:,} in ≤ {STATES_S:g} s",
    )
    rates = [
        (states / seconds, states, seconds, label_of(row))
        for row in explore.rows
        if (states := column(row, "worlds")) and (seconds := column(row, "seconds"))
    ]
    if not rates:
        return _judge(name, goal, "", None)
    # What a space would reach in a minute, going by the largest, says less than one that has.
    enough = [r for r in rates if r[1] >= STATES] or [max(rates, key=lambda rate: rate[1])]
    _, states, seconds, label = min(enough, key=lambda rate: rate[2] / rate[1])
    said = f"{states:,.0f} in {seconds:.1f} s ({label})"
    in_s = STATES / states * seconds
    if states >= STATES and in_s <= STATES_S < seconds:
        said += f"; {STATES:,} in {in_s:.1f} s at this rate"
    return _judge(name, goal, said, states >= STATES and in_s <= STATES_S)


def _full_space(explore: Part) -> Goal:
    name = "the space of 2 allocations by 2 connections, with crashes"
    words = ("two allocations", "two connections", "crash")
    rows = [row for row in explore.rows if all(word in label_of(row) for word in words)]
    if not rows:
        return _judge(name, "finished", "", None)
    largest = max(rows, key=lambda row: column(row, "worlds") or 0.0)
    is_whole = all(row.get("complete") == "yes" for row in rows)
    reached = f"{largest.get('worlds')} worlds, {largest.get('moves')} moves: {label_of(largest)}"
    return _judge(name, "finished", reached, is_whole)


def _rates(rates: Part) -> Iterator[Goal]:
    for name, least in RATES_A_SECOND.items():
        count, seconds = figure(rates, name, without=("cpu",)), figure(rates, "cpu", name)
        rate = count / seconds if count and seconds else None
        goal = f"≥ {least:,.0f} a second of one core"
        yield _judge(name, goal, f"{rate or 0:,.0f}", None if rate is None else rate >= least)


def _cells(summary: Summary) -> Iterator[Goal]:
    missed, hits = summary.missed, summary.hits
    for adapter in dict.fromkeys([*ADAPTERS, *summary.cells]):
        owed, hit = OWED.get(adapter, LIVES), hits.get(adapter, set())
        goal = f"{len(owed)} that it is to hit"
        reached = f"{len(owed & hit)}; of {len(LEGAL - owed)} others {len(hit - owed)}"
        is_reached = not missed[adapter] if adapter in missed else None
        yield _judge(f"cells hit: {adapter}", goal, reached, is_reached, is_promise=True)
    if hits:
        said = f"{len(LEGAL) - len(summary.unhit)}"
        is_reached = not summary.unhit
        yield _judge("cells hit: any of these", f"all {len(LEGAL)}", said, is_reached)


def _programs(differential: Part) -> Iterator[Goal]:
    name = "random programs, simulation against Linux"
    yield _at_least(differential, name, ("program",), PROGRAMS)
    yield _at_least(differential, f"{name}: backends", ("backend program",), BACKEND_PROGRAMS)
    found = len(differential.found)
    is_reached = found == 0 if differential.tasks else None
    yield _judge("differences between them", "0", f"{found}", is_reached, is_promise=True)


def _canaries(canaries: Part) -> Iterator[Goal]:
    yield _at_least(canaries, "canaries", ("canaries",), CANARIES)
    rows = canaries.rows
    for layer, most in KILL_TIMES_S.items():
        known = {
            label_of(row): seconds
            for row in rows
            if goal_of_layer(row) == most
            and (seconds := column(row, "slowest", "seconds", "time")) is not None
        }
        said = ""
        if known:
            slowest = max(known, key=lambda name: known[name])
            said = f"{known[slowest]:.2f} s at most ({slowest}), {len(known)} canaries"
        is_reached = max(known.values()) < most if known else None
        yield _judge(f"canaries, time to catch: {layer}", f"< {most:g} s each", said, is_reached)
    survivors = figure(canaries, "survived")
    is_reached = None if survivors is None else survivors == 0
    yield _judge("canaries that survive", "0", f"{survivors or 0:g}", is_reached, is_promise=True)


def _catches(catches: Part) -> Iterator[Goal]:
    rows = catches.rows
    caught = sum(row["layer"] == STATEFUL and row["caught"] == "yes" for row in rows)
    shown = sum(row["layer"] == STATEFUL for row in rows)
    said = f"{caught} of {shown}"
    is_reached = caught >= shown * STATEFUL_SHARE if shown else None
    goal = f"≥ {STATEFUL_SHARE:.0%}"
    yield _judge("planted bugs that the stateful machine catches", goal, said, is_reached)
    without, none = idle(rows), uncaught(rows)
    name = "layers that catch nothing which another does not"
    yield _judge(name, "0", ", ".join(without) or "0", not without if rows else None)
    name = "planted bugs that no layer catches"
    yield _judge(name, "0", ", ".join(none) or "0", not none if rows else None)


def goal_of_layer(row: Mapping[str, str]) -> float | None:
    """Say how long the layer may take that a canary's row names."""
    layer = next((said.lower() for name, said in row.items() if "layer" in name.lower()), "")
    return next((most for word, most in KILL_TIMES_S.items() if word in layer), None)


def label_of(row: Mapping[str, str]) -> str:
    """Say what a row is about: its first column."""
    return next(iter(row.values()), "")
