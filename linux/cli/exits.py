"""How does the command tell that it could not do what it was told?

With one line on standard error and an exit code. Every verb raises `Failure`; `cli.main` prints
and returns. Imports next to nothing, so that `--help` stays quick.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import Final

PROGRAM: Final = "nshandoff"
"""The command's name, in front of everything it says on standard error."""

SIGNAL_BASE: Final = 128
"""What is added to a signal's number to make the exit code of whoever it ended."""


class ExitCode(IntEnum):
    """What the command exits with, unless it passes on the exit status of another."""

    OK = 0
    """Done."""
    NO = 1
    """Asked and answered; the answer is no."""
    USAGE = 2
    """The command line makes no sense; nothing was done."""
    ENVIRONMENT = 3
    """This node, or this user on it, cannot."""
    UNAVAILABLE = 4
    """The provider cannot be had, and self-service was not allowed."""
    RUN_FAILED = 125
    """`run` itself failed, for whatever reason; the command was not executed."""
    NOT_EXECUTABLE = 126
    """`run`: the command cannot be executed."""
    NOT_FOUND = 127
    """`run`: there is no such command."""


class Failure(Exception):
    """
    The command cannot go on, and says why.

    Args:
        code: What to exit with.
        text: One sentence for a person.
        kind: The kind of error, if it has a name of its own.
    """

    def __init__(self, code: ExitCode, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.code: Final = code
        self.text: Final = text
        self.kind: Final = kind

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.kind else self.text


class Interrupted(BaseException):
    """A signal told the command to stop; not an `Exception`, so that nobody takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number: Final = number


def tell(text: str) -> None:
    """Say something to the person at the terminal; standard output belongs to the results."""
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
