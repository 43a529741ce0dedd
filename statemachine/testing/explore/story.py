"""How a counterexample is told: as a test, as a sequence diagram, and as a provider's lives."""

from __future__ import annotations

from ...effects import Effect
from ...events import ProviderInput
from ...messages import Message
from .world import Bounds, Move

ProviderRun = tuple[tuple[str, ...], list[tuple[ProviderInput, tuple[Effect, ...]]]]
"""From a provider's start to its death: the names it remembers, and each event with its effects."""


class Story:
    """Takes down what happens while a script is replayed."""

    def __init__(self, bounds: Bounds) -> None:
        self._lines = ["sequenceDiagram"]
        for index in range(bounds.consumers):
            self.draw(f"participant C{index} as consumer {index}")
        self.draw("participant P as provider")
        self.draw("participant N as node")
        self.lives: list[ProviderRun] = []
        self.start(())

    # --- The diagram ---------------------------------------------------------------------------

    def move(self, move: Move) -> None:
        """A move is made next."""
        self.draw(f"Note over P: {' '.join(map(str, move))}")

    def say(self, arrow: str, message: Message, fate: str = "") -> None:
        """A message arrives."""
        name = getattr(message, "allocation_id", "")
        self.draw(f"{arrow}: {type(message).__name__}({name}){fate}")

    def end(self, finding: str) -> None:
        """This is what came of it."""
        self.draw(f"Note over P: BROKEN {finding.splitlines()[0]}".replace(";", ","))

    def draw(self, line: str) -> None:
        """Something happens that is no message."""
        self._lines.append(f"    {line}")

    @property
    def chart(self) -> str:
        """What happened, as Mermaid in Markdown."""
        return "\n".join(["```mermaid", *self._lines, "```"])

    # --- What the provider took in -------------------------------------------------------------

    def start(self, remembered: tuple[str, ...]) -> None:
        """A provider starts, and its backend remembers names."""
        self.lives.append((remembered, []))

    def turn(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """The provider's kernel is fed, and has decided; nothing if it refused."""
        self.lives[-1][1].append((event, effects))


def as_python(bounds: Bounds, script: tuple[Move, ...], finding: str) -> str:
    """Write a script as a program."""
    moves = "".join(f"        {move!r},\n" for move in script)
    names = [f"{name}={getattr(bounds, name)!r}" for name in _changed(bounds)]
    return (
        "from statemachine.testing.explore import *\n\n\n"
        f"def test_counterexample() -> None:  # {finding.splitlines()[0]}\n"
        f"    Explorer(Bounds({', '.join(names)})).replay([\n{moves}    ])\n"
    )


def _changed(bounds: Bounds) -> list[str]:
    known = Bounds.__dataclass_fields__.items()
    return [name for name, spec in known if getattr(bounds, name) != spec.default]
