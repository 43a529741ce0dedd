"""How a counterexample is told: as a test, as a sequence diagram, and as a provider's trace."""

from __future__ import annotations

from explore_world import Bounds, Move

from statemachine.effects import Effect
from statemachine.events import Event
from statemachine.messages import Message
from statemachine.provider import Limits
from transport.trace import Entry, Recovery, Start, Turn, encode_line


class Story:
    """Takes down what happens while a script is replayed."""

    def __init__(self, bounds: Bounds) -> None:
        self._limits = bounds.limits or Limits()
        self._lines = ["sequenceDiagram"]
        for index in range(bounds.consumers):
            self.draw(f"participant C{index} as consumer {index}")
        self.draw("participant P as provider")
        self.draw("participant N as node")
        self._entries: list[Entry] = []
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

    # --- The trace -----------------------------------------------------------------------------

    def start(self, remembered: tuple[str, ...]) -> None:
        """A provider starts, and its backend remembers names."""
        self._entries += [Start(self._limits), Recovery(remembered)]

    def turn(self, event: Event, effects: tuple[Effect, ...]) -> None:
        """The provider's kernel is fed, and has decided; if it stumbled, nothing."""
        self._entries.append(Turn(event, effects))

    @property
    def trace(self) -> bytes:
        """What a provider would have written down that was started with `--trace`."""
        lines, sequence = [], 0
        for entry in self._entries:
            sequence = 0 if isinstance(entry, Start) else sequence + 1
            lines.append(encode_line(sequence, entry))
        return b"".join(lines)


def as_python(bounds: Bounds, script: tuple[Move, ...], finding: str) -> str:
    """Write a script as a program."""
    moves = "".join(f"        {move!r},\n" for move in script)
    names = [f"{name}={getattr(bounds, name)!r}" for name in _changed(bounds)]
    return (
        "from explore import *\n\n\n"
        f"def test_counterexample() -> None:  # {finding.splitlines()[0]}\n"
        f"    Explorer(Bounds({', '.join(names)})).replay([\n{moves}    ])\n"
    )


def _changed(bounds: Bounds) -> list[str]:
    known = Bounds.__dataclass_fields__.items()
    return [name for name, spec in known if getattr(bounds, name) != spec.default]
