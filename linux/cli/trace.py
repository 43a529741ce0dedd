"""`nshandoff trace`: check or draw a trace that `serve --trace FILE` wrote.

A trace has every event of a provider and what the provider decided. `check` feeds the events to a
kernel and compares its decisions: it needs no provider, no root and no Linux.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from statemachine.effects import Effect
from statemachine.events import ProviderInput
from statemachine.provider import Limits
from transport.descriptors import Descriptor
from transport.trace import (
    Entry,
    Recovery,
    Start,
    TraceError,
    Turn,
    encode_line,
    read_lines,
)
from transport.trace.check import Impossible, Replay
from transport.trace.diagram import sequence_diagram
from transport.trace.records import LINE_BYTES_MAX

from .exits import ExitCode, Failure

_log: Final = logging.getLogger(__name__)


def check(options: argparse.Namespace) -> ExitCode:
    """
    Check that a trace can have happened.

    Raises:
        Failure: ENVIRONMENT, the file cannot be read.
    """
    with _lines_of(options.file) as lines:
        replay = Replay()
        try:
            replay.take_all(lines)
        except TraceError as error:
            print(f"{options.file}:{error.line}: {error.reason}")
            if isinstance(error, Impossible):
                print(*(f"  {line}" for line in error.instead), sep="\n")
            return ExitCode.NO
    counted = f"{replay.turns} events, {replay.starts} starts, {replay.gaps} gaps"
    print(f"{options.file}: possible: {counted}")
    return ExitCode.OK


def show(options: argparse.Namespace) -> ExitCode:
    """
    Draw a trace, or what of it concerns one allocation, as a Mermaid sequence diagram.

    Raises:
        Failure: ENVIRONMENT, the file cannot be read; NO, it is no trace.
    """
    # End quietly if the reader closes the pipe, as `head` does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with _lines_of(options.file) as lines:
        entries = (entry for _, _, entry in read_lines(lines))
        try:
            for line in sequence_diagram(entries, options.allocation):
                print(line)
        except TraceError as error:
            raise Failure(ExitCode.NO, f"{options.file}: {error}", "TraceError") from error
    return ExitCode.OK


@contextmanager
def _lines_of(path: str) -> Iterator[Iterator[bytes]]:
    """Read a file line by line; a line that is too long comes in pieces, the first too long."""
    try:
        with Path(path).open("rb") as file:
            yield iter(lambda: file.readline(LINE_BYTES_MAX + 1), b"")
    except OSError as error:
        raise Failure(ExitCode.ENVIRONMENT, str(error), type(error).__name__) from error


# --- Writing -----------------------------------------------------------------------------------


class TraceFile:
    """
    Writes every event of a provider to a file before its effects are performed: an `Observer`.

    Each line is one `write`, without a buffer, so that the file has everything that was performed
    if the provider is killed. A line that cannot be written leaves a gap in the numbers.

    Args:
        path: Appended to; made with mode 0600 if it does not exist.
        limits: The kernel's.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str, limits: Limits) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._path: Final = path
        self._file: Final = Descriptor(os.open(path, flags, 0o600))
        self._sequence = 0
        size = os.fstat(self._file.fileno()).st_size
        self._is_whole = size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n"
        self._write(Start(limits))

    def __call__(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Write one event."""
        self._write(Turn(event, effects))

    def recovered(self, remembered: Iterable[str]) -> None:
        """Write the names that the backend remembers."""
        self._write(Recovery(tuple(remembered)))

    def _write(self, entry: Entry) -> None:
        line = encode_line(self._sequence, entry)
        self._sequence += 1
        if not self._is_whole:
            line = b"\n" + line
        try:
            self._is_whole = os.write(self._file.fileno(), line) == len(line)
        except OSError as error:
            _log.warning("%s: %s", self._path, error)

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
