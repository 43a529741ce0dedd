"""Log JSON lines on standard error, from a thread, so that who reads them slowly stops nothing."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from transport.calls import syscall

from ..sinks import Sink

STDERR: Final = 2

_log: Final = logging.getLogger(__name__)


_JSON: Final = json.JSONEncoder(default=str)


def _line_of(moment: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
    when = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    begin = {"time": when.isoformat(timespec="milliseconds"), "level": level, "event": event}
    return _JSON.encode({**begin, **fields})


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, event, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        fields = dict(getattr(record, "fields", {}))
        message = record.getMessage()
        if message:
            fields["message"] = message
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        event = getattr(record, "event", record.name)
        return _line_of(record.created, record.levelname.lower(), event, fields)


class LogHandler(logging.Handler):
    """Gives lines to a sink of standard error, which is borrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._sink: Final = Sink(STDERR, preface=self._say_lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; never waits."""
        self._put(self.format(record))

    def tell(self, make: Callable[[], tuple[str, Mapping[str, Any]]]) -> None:
        """
        Have an event written, of which there are thousands a second: without a record.

        Args:
            make: Makes its name and fields, in the thread that writes; must not raise.
        """
        moment = time.time()
        self._sink.write(lambda: f"{_line_of(moment, 'info', *make())}\n".encode())

    def close(self) -> None:
        """Write what waits, as far as that is possible in a short time."""
        self._sink.close()
        super().close()

    def _put(self, line: str) -> None:
        self._sink.write(f"{line}\n".encode())

    def _say_lost(self, count: int, why: str) -> bytes:
        fields = {"count": count, "message": f"lines of this log were lost: {why}"}
        return f"{_line_of(time.time(), 'warning', 'lines_lost', fields)}\n".encode()


def open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed, lest another file gets their number."""
    for fd in range(STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            syscall(os.open, os.devnull, os.O_RDWR)  # takes the lowest number that is free


@contextmanager
def logging_to_stderr() -> Iterator[LogHandler]:
    """Log JSON lines on standard error, all that Python itself would print there included."""
    handler = LogHandler()
    logging.getLogger().addHandler(handler)
    _log.setLevel(logging.INFO)  # of other loggers only warnings
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    sys.unraisablehook = lambda hook: _log.error(
        "%s", hook.err_msg or "unraisable", exc_info=hook.exc_value
    )
    threading.excepthook = lambda hook: _log.error("in a thread", exc_info=hook.exc_value)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__


@contextmanager
def logging_failure(event: str) -> Iterator[None]:
    """Log an error of the body, which goes no further."""
    try:
        yield
    except OSError as error:
        _log.warning("%s", error, extra=as_event(event))


def log_event(event: str, **fields: Any) -> None:
    """Log something that happened, with its fields."""
    _log.info("", extra=as_event(event, **fields))


def as_event(event: str, **fields: Any) -> dict[str, Any]:
    """Return the `extra` of a log record: the name of an event, and its fields."""
    return {"event": event, "fields": fields}
