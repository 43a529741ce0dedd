"""What one part of a campaign has to show: plain figures, rows and cells, and what it found.

Each part (`explore`, `stateful`, `differential`, `faults`, `mutants`, `canaries`, …) is a module
with two functions. A task is small enough to be done again when a campaign was interrupted in it.

    def tasks(scale: float) -> list[Task]: ...      # 1.0: minutes; more: proportionally longer
    def run(seed: int, **arguments) -> Outcome: ... # one of them, in a process of its own
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

Culprit: TypeAlias = Literal["promise", "simulation", "campaign"]
"""What is wrong: the code, the simulated node, or the campaign, as with a task that died."""


@dataclass(frozen=True)
class Task:
    """A piece of work; the same name and seed give the same outcome."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """For `run`, as JSON can say it."""
    is_long: bool = False
    """Whether it is begun before others, because it takes minutes."""


@dataclass(frozen=True)
class Discovery:
    """Something that is wrong, and how to see it again."""

    title: str
    script: str
    """A test that shows it, as Python; or the command that does."""
    diagram: str = ""
    """A Mermaid sequence diagram."""
    culprit: Culprit = "promise"


@dataclass
class Outcome:
    """What a task has to show."""

    figures: dict[str, float] = field(default_factory=dict)
    """Counts of what was done, in the words of the report; those of a part are summed."""
    cells: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each cell was hit: adapter -> "table state Event" -> times."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Lines of the part's table in the report; all of them with the same keys."""
    discoveries: list[Discovery] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Say it in what JSON has."""
        return asdict(self)

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Outcome:
        """Take back what `as_json` said."""
        found = [Discovery(**each) for each in said["discoveries"]]
        return cls(**{**said, "discoveries": found})
