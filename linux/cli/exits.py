"""Exit codes of `nshandoff`, and the exceptions that lead to them.

A verb raises `Failure`; `cli.main` prints it in one line on standard error and returns its exit
code. Imports next to nothing, so that `--help` stays quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Final, TextIO

PROGRAM: Final = "nshandoff"
"""The command's name, the prefix of everything that it prints on standard error."""

SIGNAL_BASE: Final = 128
"""A process that a signal ended has the exit code of this plus the signal's number."""


class ExitCode(IntEnum):
    """The exit codes, unless the exit code of another command is passed on."""

    OK = 0
    """Done."""
    NO = 1
    """The answer is no."""
    USAGE = 2
    """The command line makes no sense; nothing was done."""
    ENVIRONMENT = 3
    """This node, or this user on it, cannot."""
    UNAVAILABLE = 4
    """The provider cannot be reached, and self-service was not allowed."""
    RUN_FAILED = 125
    """`run` or `exec` itself failed, for any reason."""
    NOT_EXECUTABLE = 126
    """`run`, `exec`: the command cannot be executed."""
    NOT_FOUND = 127
    """`run`, `exec`: there is no such command."""


class Failure(Exception):
    """
    The command cannot go on.

    Args:
        code: The exit code.
        text: The reason, one sentence.
        kind: The name of the error's class, if it is one of the protocol's or the node's.
    """

    def __init__(self, code: ExitCode, text: str, kind: str = "") -> None:
        super().__init__(code, text, kind)
        self.code: Final = code
        self.text: Final = text
        self.kind: Final = kind

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.kind else self.text


class Interrupted(Exception):
    """A signal told the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number: Final = number


@contextmanager
def ended_by_sigpipe() -> Iterator[None]:
    """Have the program end quietly if the reader of its output closes the pipe, as by head(1)."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        with suppress(OSError):  # what cannot be written is tried, and said, at the end
            sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)


def print_error(text: str) -> None:
    """Print a line on standard error, if it can be written; standard output is for results."""
    with suppress(OSError):
        print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
    flush(sys.stderr)


def flush(stream: TextIO) -> str:
    """
    Write what waits for a standard stream; if that fails, nothing more is written to it.

    Otherwise Python would try again when it exits, and exit with a code of its own.

    Returns:
        Why it cannot be written; empty if it can.
    """
    try:
        stream.flush()
    except OSError as error:
        from transport.descriptors import Descriptor

        Descriptor(stream.fileno()).close()
        os.open(os.devnull, os.O_WRONLY)  # gets the number that has become free
        stream.flush()
        return error.strerror or str(error)
    return ""
