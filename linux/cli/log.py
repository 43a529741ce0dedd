"""Log JSON lines on standard error, from a thread, so that who reads them slowly stops nothing."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from transport.calls import syscall

from ..sinks import Sink

STDERR: Final = 2

_log: Final = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, event, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            **getattr(record, "fields", {}),
        }
        message = record.getMessage()
        if message:
            line["message"] = message
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _LogHandler(logging.Handler):
    """Gives lines to a sink of standard error, which is borrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._sink: Final = Sink(STDERR, preface=self._say_lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; never waits."""
        self._sink.write(self._line_of(record))

    def close(self) -> None:
        """Write what waits, as far as that is possible in a short time."""
        self._sink.close()
        super().close()

    def _line_of(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode()

    def _say_lost(self, count: int, why: str) -> bytes:
        record = _log.makeRecord(
            *(_log.name, logging.WARNING, __file__, 0, "lines of this log were lost: %s", (why,)),
            exc_info=None,
            extra=as_event("lines_lost", count=count),
        )
        return self._line_of(record)


def open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed, lest another file gets their number."""
    for fd in range(STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            syscall(os.open, os.devnull, os.O_RDWR)  # takes the lowest number that is free


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log JSON lines on standard error, all that Python itself would print there included."""
    handler = _LogHandler()
    logging.getLogger().addHandler(handler)
    _log.setLevel(logging.INFO)  # of other loggers only warnings
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    sys.unraisablehook = lambda hook: _log.error(
        "%s", hook.err_msg or "unraisable", exc_info=hook.exc_value
    )
    threading.excepthook = lambda hook: _log.error("in a thread", exc_info=hook.exc_value)
    try:
        yield
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
