"""What a campaign has to show, put together: by part, and by cell of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from statemachine.lifecycle import ALLOCATION, CONSUMER, NOTICE, TABLES
from tests.campaign.outcome import Discovery
from tests.campaign.verify_record import Done

Cell = tuple[str, str, str]
"""Table, state, event."""

LEGAL: Final[frozenset[Cell]] = frozenset(
    (table.name, str(row.source.value), row.event.__name__)
    for table in TABLES
    for row in table.rows
)
"""Every cell that has a row."""

LIVES: Final = frozenset(
    cell for cell in LEGAL if cell[0] in (ALLOCATION.name, CONSUMER.name, NOTICE.name)
)
"""The cells of the tables that a tour of the stateful machines goes through on every adapter."""

EXPLORER: Final = "explorer"

BEYOND: Final[frozenset[Cell]] = frozenset(
    {
        ("message", "granted", "GrantWithdrawn"),
        ("service", "aborted", "PeerRefused"),
        ("service", "aborted", "RequestOverLimit"),
        ("service", "starting", "QueueFull"),
        ("service", "stopping", "ConnectionFlooded"),
        ("service", "stopping", "PeerRefused"),
        ("service", "stopping", "RequestOverLimit"),
    }
)
"""
Cells that need a limit to be met while the provider starts or stops, or a grant behind another
answer: more messages than the explorer's spaces have. The vectors have a case for each of them, and
the mutants of these rows are found by lives that lead there.
"""

OWED: Final = {EXPLORER: LEGAL - BEYOND}
"""The cells that an adapter is to hit, if those are not `LIVES`."""


@dataclass(frozen=True)
class FoundBy:
    """A discovery, and what finds it again."""

    part: str
    seed: int
    discovery: Discovery


@dataclass
class Part:
    """What all tasks of one part have to show together."""

    name: str
    tasks: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    """Of tasks that were done in several rounds, those of the last."""
    found: list[FoundBy] = field(default_factory=list)


@dataclass
class Summary:
    """A whole campaign."""

    parts: dict[str, Part] = field(default_factory=dict)
    cells: dict[str, dict[Cell, int]] = field(default_factory=dict)
    """Visits, by adapter."""

    @property
    def found(self) -> list[FoundBy]:
        """Everything that was found."""
        return [found for part in self.parts.values() for found in part.found]

    @property
    def hits(self) -> dict[str, set[Cell]]:
        """The cells that an adapter hit, of the adapters that were tried."""
        return {name: {c for c, n in cells.items() if n} for name, cells in self.cells.items()}

    @property
    def missed(self) -> dict[str, list[Cell]]:
        """The cells that an adapter was to hit, and did not."""
        return {name: sorted(OWED.get(name, LIVES) - hit) for name, hit in self.hits.items()}

    @property
    def unhit(self) -> list[Cell]:
        """The cells that no adapter hit. The vectors have a case for every cell."""
        return sorted(LEGAL.difference(*self.hits.values()))

    @property
    def visits(self) -> dict[Cell, int]:
        """Visits by all adapters together."""
        total: dict[Cell, int] = {}
        for cells in self.cells.values():
            for cell, count in cells.items():
                total[cell] = total.get(cell, 0) + count
        return total


def summary_of(done: Iterable[Done]) -> Summary:
    """Put outcomes together; their order does not matter."""
    summary = Summary()
    latest: dict[tuple[str, str], Done] = {}
    for one in sorted(done, key=lambda done: (done.part, done.round, done.name, done.key)):
        part = summary.parts.setdefault(one.part, Part(one.part))
        part.tasks += 1
        part.seconds += one.outcome.seconds
        for name, count in one.outcome.figures.items():
            part.figures[name] = part.figures.get(name, 0) + count
        part.found += [FoundBy(one.part, one.seed, found) for found in one.outcome.discoveries]
        for adapter, cells in one.outcome.cells.items():
            hits = summary.cells.setdefault(adapter, {})
            for name, count in cells.items():
                table, state, event = name.split(" ")
                hits[table, state, event] = hits.get((table, state, event), 0) + count
        latest[one.part, one.name] = one
    for (name, _), one in sorted(latest.items()):
        summary.parts[name].rows += one.outcome.rows
    return summary


def number_in(said: str) -> float | None:
    """Read the number that a row's text begins with; None if it begins with none."""
    digits = said.strip().replace(",", "").replace("_", "").split(" ")[0].rstrip("%s")
    try:
        return float(digits)
    except ValueError:
        return None


def plain(count: float) -> str:
    """Write a figure."""
    return f"{count:,.0f}" if count == int(count) else f"{count:,.2f}"


def text_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Write a table for a terminal."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for index, cells in enumerate(lines):
        yield "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
        if index == 0:
            yield "  ".join("-" * width for width in widths)
