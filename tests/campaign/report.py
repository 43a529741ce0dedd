"""The page at the end of a campaign: one file, nothing to fetch, the same for the same outcomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from specs._build.graph import state_graph
from specs._build.sequence import NotDrawable, sequence
from specs._build.svg import arrow_heads
from statemachine.lifecycle import TABLES
from statemachine.table import Table
from tests.campaign.report_catches import by_bug, by_layer
from tests.campaign.report_charts import Bar, Dots, bars, dots, heat_map, stacks
from tests.campaign.report_goals import (
    ADAPTERS,
    RATES_A_SECOND,
    STATES_A_SECOND,
    Goal,
    GoalStatus,
    column,
    goal_of_layer,
    goals_of,
    label_of,
)
from tests.campaign.report_opening import opening_of
from tests.campaign.report_summary import Cell, FoundBy, Part, Summary, number_in, plain
from tests.campaign.verify_progress import clock
from tests.campaign.verify_record import Head

STYLE: Final = Path(__file__).with_name("report.css")

ReportRow = Mapping[str, str]


def report(head: Head, summary: Summary, not_run: Sequence[str] = ()) -> str:
    """Write the page; `not_run` are the parts that were not asked for."""
    sections = [
        _section("found", "What was found", _found(summary.found)),
        _section("states", "The life of an allocation, by visits", _graphs(summary)),
        _section("goals", "What was to be reached", _goals(goals_of(summary))),
        _section("cells", "Every state, every event, every adapter", _heat_maps(summary)),
        *(_part(part) for part in summary.parts.values()),
        _section("machine", "On what, and from what", _environment(head, summary)),
    ]
    title = "Namespace handoff: the verified kernel"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"{arrow_heads()}\n<header>\n<h1>{title}</h1>\n{_banner(head, summary, not_run)}"
        "</header>\n<main>\n" + "".join(sections) + "</main>\n</body>\n</html>\n"
    )


def _banner(head: Head, summary: Summary, not_run: Sequence[str]) -> str:
    goals = goals_of(summary)
    reached = sum(goal.verdict is GoalStatus.REACHED for goal in goals)
    found = len(summary.found)
    tasks = sum(part.tasks for part in summary.parts.values())
    missed = sum(len(cells) for cells in summary.missed.values())
    opening = opening_of(summary, not_run)
    says = [said for said in (opening.missing, opening.found) if said]
    tiles = {
        "tasks": f"{tasks:,}",
        "found": f"{found:,}",
        "cells missed": f"{missed:,}",
        "goals reached": f"{reached} of {len(goals)}",
        "computed for": clock(sum(part.seconds for part in summary.parts.values())),
        "seed": f"{head.seed}",
    }
    lines = "".join(f'<p class="verdict {opening.colour}">{escape(line)}.</p>\n' for line in says)
    return lines + _tiles(tiles)


def _section(name: str, title: str, inside: str) -> str:
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{inside}</section>\n'


def _tiles(figures: Mapping[str, str]) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(said)}</dd></div>"
        for name, said in figures.items()
    )
    return f'<dl class="tiles">{tiles}</dl>\n'


def _table(rows: Sequence[ReportRow], caption: str, marks: Sequence[str] = ()) -> str:
    """Write rows as a table; `marks` are the classes of its lines."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for index, row in enumerate(rows):
        mark = f' class="{marks[index]}"' if index < len(marks) and marks[index] else ""
        cells = "".join(_table_cell(row.get(name, "")) for name in names)
        lines.append(f"<tr{mark}>{cells}</tr>\n")
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _table_cell(said: str) -> str:
    name = ' class="number"' if number_in(said) is not None else ""
    return f"<td{name}>{escape(said)}</td>"


def _folded(summary: str, inside: str) -> str:
    return f"<details>\n<summary>{escape(summary)}</summary>\n{inside}</details>\n"


def _figure(svg: str, caption: str = "") -> str:
    said = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return f'<figure><div class="wide">{svg}</div>\n{said}</figure>\n'


# --- The sections ------------------------------------------------------------------------------


def _goals(goals: Sequence[Goal]) -> str:
    rows = [
        {
            "figure": goal.figure,
            "to be reached": goal.goal,
            "reached": goal.reached,
            "verdict": f"{_SIGNS[goal.verdict]} {goal.verdict.value}",
        }
        for goal in goals
    ]
    marks = [goal.verdict.name.lower().replace("_", "-") for goal in goals]
    return _table(rows, "Goals, and what this campaign reached of them", marks)


_SIGNS: Final = {GoalStatus.REACHED: "✓", GoalStatus.NOT_REACHED: "✗", GoalStatus.NOT_MEASURED: "?"}


def _found(found: Sequence[FoundBy]) -> str:
    if not found:
        return '<p class="nothing">Nothing.</p>\n'
    return "".join(map(_discovery, found))


def _discovery(found: FoundBy) -> str:
    this = found.discovery
    drawn = ""
    if this.diagram:
        text = _folded("the diagram's text", f"<pre>{escape(this.diagram)}</pre>\n")
        try:
            drawn = _figure(sequence(this.diagram)) + text
        except NotDrawable:
            drawn = f"<pre>{escape(this.diagram)}</pre>\n"
    return (
        f'<article class="found">\n<h3>{escape(found.part)}: {escape(this.title)}</h3>\n'
        f"<p>Seed {found.seed}.</p>\n{drawn}<pre>{escape(this.script)}</pre>\n</article>\n"
    )


def _graphs(summary: Summary) -> str:
    if not summary.cells:
        return '<p class="nothing">No adapter was tried.</p>\n'
    visits = summary.visits
    about = (
        "<p>Line and colour: how often a move was made, by its logarithm, in all adapters "
        'together. What never happened is <span class="missed-word">dashed and red</span>. Events '
        "that leave a state as it is are counted in its box. Point at anything for its figures."
        "</p>\n"
    )
    return about + "".join(_graph(table, visits) for table in TABLES)


def _graph(table: Table, visits: Mapping[Cell, int]) -> str:
    rows, marks = [], []
    for row in table.rows:
        source, target = str(row.source.value), str(row.target.value)
        count = visits.get((table.name, source, row.event.__name__), 0)
        rows.append(
            {
                "event": row.event.__name__,
                "from": source,
                "to": target if row.target is not row.source else "stays",
                "visits": f"{count:,}" if count else "never",
            }
        )
        marks.append("" if count else "not-reached")
    hit = sum(not mark for mark in marks)
    legend = _table(rows, f"Every row of the table {table.name}", marks)
    return (
        f"<h3>{table.name}: {hit} of {len(rows)} rows</h3>\n"
        f'<div class="beside">\n{_figure(state_graph(table, visits))}'
        f'<div class="legend" tabindex="0">\n{legend}</div>\n</div>\n'
    )


def _heat_maps(summary: Summary) -> str:
    if not summary.cells:
        return '<p class="nothing">No adapter was tried.</p>\n'
    about = (
        "<p>A cell is a state and an event of a table. Each number says how often an adapter was "
        "in this state when this event happened. "
        'Outlined in <span class="missed-word">red</span>: there is a row, and it was never taken. '
        "Blank: there is no row, the event is refused.</p>\n"
    )
    ours = [*(name for name in ADAPTERS if name in summary.cells), *summary.cells]
    panels = {name: summary.cells[name] for name in ours}
    maps = "".join(f"<h3>{table.name}</h3>\n{_figure(heat_map(table, panels))}" for table in TABLES)
    missed = [
        {"adapter": adapter, "table": cell[0], "state": cell[1], "event": cell[2]}
        for adapter, cells in {**summary.missed, "any": summary.unhit}.items()
        for cell in cells
    ]
    listed = _table(missed, "Cells that were to be hit, and those that no adapter hit")
    return about + maps + (_folded(f"cells missed: {len(missed)}", listed) if missed else "")


def _environment(head: Head, summary: Summary) -> str:
    said = {
        "started": head.started,
        "seed": str(head.seed),
        "fingerprint of the sources": head.fingerprint,
        **head.environment,
        "tasks": ", ".join(f"{part.name} {part.tasks}" for part in summary.parts.values()),
    }
    rows = [{"what": name, "which": value} for name, value in said.items()]
    return _table(rows, "The machine, the sources, the seed")


# --- The parts ---------------------------------------------------------------------------------


def _part(part: Part) -> str:
    figures = {
        name: plain(count) for name, count in part.figures.items() if "seconds" not in name.lower()
    }
    figures |= {"tasks": f"{part.tasks}", "computed for": clock(part.seconds)}
    pictures = "".join(_PICTURES.get(part.name, lambda part: [])(part))
    rows = _table(part.rows, f"What the part {part.name} has to show") if part.rows else ""
    if len(part.rows) > ROWS_SHOWN_MAX:
        rows = _folded(f"the {len(part.rows)} rows", rows)
    title, about = _TITLES.get(part.name, (part.name, ""))
    said = f"<p>{escape(about)}</p>\n" if about else ""
    return _section(f"part-{part.name}", title, said + _tiles(figures) + pictures + rows)


ROWS_SHOWN_MAX: Final = 12
"""Longer tables are folded."""

_TITLES: Final = {
    "canaries": (
        "Canaries: seeded bugs",
        "Each was put into the sources on purpose; the layer that should catch it has to.",
    ),
    "catches": (
        "Which layer catches which planted bug",
        "Every layer, as CI runs it, is shown every bug. What no other catches is what it is for.",
    ),
    "differential": (
        "The simulation against Linux",
        "Random programs, run on both; what each step gives is compared.",
    ),
    "explore": (
        "Every world within bounds",
        "A world is a provider's kernel, its peers' kernels, what is under way between them, and "
        "the node. Breadth first, in lock-step with the independent model.",
    ),
    "faults": (
        "Faults in system calls",
        "Each call of a life fails with each errno it may fail with; then pairs of them.",
    ),
    "mutants": (
        "Mutants of the tables and of the code",
        "A mutant is the table, or the code, with one small change: some test has to fail. One "
        "that is argued behaves like the original.",
    ),
    "open": (
        "The kernel in an open environment",
        "Every event that a driver may report, in any order, to kernel and model alike. Counted "
        "are distinct snapshots of the kernel, and distinct steps: a snapshot and an event.",
    ),
    "rates": ("How fast", "Processor time on one core."),
    "stateful": (
        "Random lives on every adapter",
        "An adapter is what the machine of rules drives: the model, the kernels, the simulated "
        "node, this node. The rules play consumers, processes and crashes.",
    ),
    "virtual": (
        "Drivers under a virtual loop and clock",
        "A scheduler chooses whose step comes next: all orders up to a depth, then random ones.",
    ),
}


def _bars(unit: str, these: Sequence[Bar], caption: str) -> Iterable[str]:
    return [_figure(bars(unit, these), caption)] if these else []


def _rated(part: Part, goals: Callable[[str], float | None], *columns: str) -> list[Bar]:
    """Make a bar of every row that says how many a second."""
    rates = [(label_of(row), column(row, *columns)) for row in part.rows]
    return [Bar(label, rate, goals(label)) for label, rate in rates if rate is not None]


def _explore(part: Part) -> Iterable[str]:
    these = _rated(part, lambda _: STATES_A_SECOND, "worlds/s", "a second", "per second")
    return _bars("worlds a second", these, "Distinct worlds a second, by space.")


def _rates(part: Part) -> Iterable[str]:
    these = _rated(part, RATES_A_SECOND.get, "a second")
    return _bars("a second", these, "A second of one core; the line is the goal.")


def _differential(part: Part) -> Iterable[str]:
    these = [
        Bar(name.removesuffix(" programs"), count)
        for name, count in part.figures.items()
        if name.endswith(" programs")
    ]
    return _bars("programs", these, "Random programs, by family.")


def _faults(part: Part) -> Iterable[str]:
    rows: dict[str, dict[str, float]] = {}
    for row in part.rows:
        counts = rows.setdefault(row.get("call", ""), {})
        for outcome, count in re.findall(r"(.+?) x ([\d,]*\d)(?:, |$)", row.get("outcomes", "")):
            counts[outcome] = counts.get(outcome, 0) + (number_in(count) or 0.0)
    if any(rows.values()):
        picture = stacks("single faults by call and outcome", dict(sorted(rows.items())))
        yield _figure(picture, "Single faults: the call that failed, and what became of it.")


def _kill_times(part: Part) -> Iterable[str]:
    these: list[Dots] = []
    for row in part.rows:
        seconds = column(row, "seconds", "slowest", "time")
        if seconds is not None:
            these.append(Dots(label_of(row), [seconds], goal_of_layer(row)))
    these.sort(key=lambda one: (one.goal or 0.0, max(one.seconds)))
    if these:
        yield _figure(
            dots("seconds to catch each", these),
            "How long each took to be caught; the line is what it may take at most.",
        )


def _catches(part: Part) -> Iterable[str]:
    if part.rows:
        yield _table(by_layer(part.rows), "Planted bugs that each layer catches")
        yield _table(by_bug(part.rows), "Who catches what")


_PICTURES: Final = {
    "canaries": _kill_times,
    "catches": _catches,
    "differential": _differential,
    "explore": _explore,
    "faults": _faults,
    "rates": _rates,
}
