"""`nshandoff trace`: check or draw a trace that `serve --trace FILE` wrote.

A trace has every event of a provider and what the provider decided. `check` feeds the events to a
kernel and compares its decisions: it needs no provider, no root and no Linux.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from statemachine.effects import Effect
from statemachine.events import ProviderInput
from statemachine.provider import Limits
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner
from transport.trace import (
    Recovered,
    Start,
    TraceEntry,
    TraceError,
    Turn,
    encode_line,
    read_lines,
)
from transport.trace.check import ImpossibleLine, Replay
from transport.trace.diagram import sequence_diagram
from transport.trace.records import LINE_BYTES_MAX

from ..sinks import Sink
from ..syscalls import calling
from .exits import ExitCode, Failure, ended_by_sigpipe

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
            if isinstance(error, ImpossibleLine):
                print(*(f"  {line}" for line in error.instead), sep="\n")
            return ExitCode.NO
    counted = f"{replay.turns} events, {replay.starts} starts, {replay.gaps} gaps"
    print(f"{options.file}: possible: {counted}")
    return ExitCode.OK


@ended_by_sigpipe()
def show(options: argparse.Namespace) -> ExitCode:
    """
    Draw a trace, or what of it concerns one allocation, as a Mermaid sequence diagram.

    Raises:
        Failure: ENVIRONMENT, the file cannot be read; NO, it is no trace.
    """
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


TRACE_WAIT_S: Final = 0.05
"""How long an event waits for its line to be written, as long as every line before it was."""


class TraceFile(Owner):
    """
    Writes every event of a provider to a file before its effects are performed: an `Observer`.

    So the file has everything that was performed, if the provider is killed. Where the file cannot
    be written, or not in `TRACE_WAIT_S`, the provider goes on: the lines that are lost leave a gap
    in the numbers, and are counted in the log.

    Args:
        path: Appended to; made with mode 0600 if it does not exist.
        limits: The kernel's.

    Raises:
        SyscallError: it cannot be opened.
    """

    # Keeps DAEMON-7.

    def __init__(self, path: str, limits: Limits) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._path: Final = path
        with calling("open(2)", path):
            self._file: Final = Descriptor(syscall(os.open, path, flags, 0o600))
            size = syscall(os.fstat, self._file.fileno()).st_size
            end = syscall(os.pread, self._file.fileno(), 1, size - 1) if size else b"\n"
        self._sink: Final = Sink(
            self._file, wait_s=TRACE_WAIT_S, report=self._report, is_cut=end != b"\n"
        )
        self._sequence = 0
        self._write(Start(limits))

    def __call__(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Write one event."""
        self._write(Turn(event, effects))

    def recovered(self, remembered: Iterable[str]) -> None:
        """Write the names that the backend remembers."""
        self._write(Recovered(tuple(remembered)))

    def close(self) -> None:
        """Write what waits, as far as that is possible in a short time, and close the file."""
        if self._sink.close():
            self._file.close()

    def _write(self, entry: TraceEntry) -> None:
        self._sink.write(encode_line(self._sequence, entry))
        self._sequence += 1

    def _report(self, count: int, why: str) -> None:
        if count:
            text, fields = f"{self._path}: lines of the trace were lost: {why}", {"count": count}
        else:
            text, fields = f"{self._path}: lines of the trace are being lost: {why}", {}
        _log.warning(text, extra={"event": "trace_lines_lost", "fields": fields})

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
