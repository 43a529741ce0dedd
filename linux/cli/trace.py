"""`nshandoff trace`: check or draw a trace that `serve --trace FILE` wrote.

A trace has every event of a provider and what the provider decided. `check` feeds the events to a
kernel and compares its decisions: it needs no provider, no root and no Linux. The trace of another
implementation is held to the reference model instead: that is a tool for tests, which this process
executes (execv(2)).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

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
from transport.trace.check import Judge, KernelJudge, checked
from transport.trace.diagram import sequence_diagram
from transport.trace.records import LINE_BYTES_MAX

from ..sinks import Sink
from ..syscalls import calling
from .exits import ExitCode, Failure, ended_by_sigpipe

_log: Final = logging.getLogger(__name__)


def check(options: argparse.Namespace) -> ExitCode:
    """
    Check that a trace can have happened, by the judge that the options name.

    Raises:
        Failure: ENVIRONMENT, the file cannot be read.
    """
    if options.by != "kernel":
        _execute_model_check(options.by, options.file)
    return check_by(options.file, KernelJudge)


def _execute_model_check(by: str, file: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    packages = str(Path(__file__).parents[2])
    words = ("-I", "-X", "utf8", "-c", _BY_MODEL, packages, by, file)
    os.execv(sys.executable, [sys.executable, *words])


_BY_MODEL: Final = (
    "import sys; path = sys.argv.pop(1); path in sys.path or sys.path.insert(0, path);"
    "from linux.testing.model_check import main; raise SystemExit(main(sys.argv[1:]))"
)


def check_by(file: str, judge: Callable[[Limits], Judge], by: str = "") -> ExitCode:
    """
    Check that a trace can have happened, and print what there is to say of it.

    Raises:
        Failure: ENVIRONMENT, the file cannot be read.
    """
    with _lines_of(file) as lines:
        is_possible, shown = checked(file, lines, judge, by)
    print(*shown, sep="\n")
    return ExitCode.OK if is_possible else ExitCode.NO


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
