"""`Sink`: write lines of a log or a trace from a thread, so that a slow or full file stops nothing.

A write can block for as long as others like: a pipe whose reader does not read, a stopped terminal,
a frozen or remote file system. It can fail for as long as a disk is full. So a daemon's event loop
writes to no file that others have a hand in: it gives lines to a `Sink`, whose thread writes them.

Lines wait in a queue of bounded size. What does not fit, or cannot be written, is lost; the lines
that are lost are counted, and the count is told with the next line that goes through.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from transport.calls import syscall

from .syscalls import FileDescriptor, SyscallError

QUEUE_BYTES_MAX: Final = 1 << 20
"""Most bytes that wait to be written; one line may wait whatever its size."""

UNMADE_BYTES: Final = 1024
"""What a line counts for that is not made yet; it is shorter as a rule."""

GATHER_S: Final = 0.01
"""How long lines are gathered before they are written: to wake a thread costs more than a line."""

CLOSE_TIMEOUT_S: Final = 0.5
"""How long the lines that wait may take to be written when a sink is closed."""

SLOW_READER: Final = "what reads it is too slow"
"""Why lines are lost for which the queue has no room."""


class _QueuedLine(NamedTuple):
    lost_before: int
    """How many lines were lost between the line before it and this one, for want of room."""
    text: bytes | Callable[[], bytes]
    size: int
    """What it counts for while it waits."""


class Sink:
    """
    Writes lines to a file, in order, from a thread of its own. Usable from any thread.

    Args:
        file: Where to write; borrowed until `close` has returned True.
        wait_s: How long `write` waits for its line to be written, as long as none was lost. With 0
            lines are gathered for `GATHER_S`, and a program that is killed may lose lines that it
            had given to the sink.
        preface: Makes the line to write before the first one that goes through after some were
            lost, from their number and the reason. None writes none.
        report: Is told when lines begin to be lost (0 and the reason), and when lines go through
            again (how many were lost, and the reason). From any thread; must not raise.
        is_cut: Whether the file ends with half a line, which is ended first.

    Raises:
        SyscallError: EAGAIN, its thread cannot be started.
    """

    # Keeps DAEMON-6.

    def __init__(
        self,
        file: FileDescriptor,
        *,
        wait_s: float = 0.0,
        preface: Callable[[int, str], bytes] | None = None,
        report: Callable[[int, str], None] | None = None,
        is_cut: bool = False,
    ) -> None:
        self._fd: Final = file if isinstance(file, int) else file.fileno()
        self._wait_s: Final = wait_s
        self._preface: Final = preface
        self._report: Final = report
        self._changed: Final = threading.Condition()
        # The next five are guarded by it.
        self._queue: list[_QueuedLine] = []
        self._bytes = 0
        """Of the lines that are not written yet, those included that the thread has taken."""
        self._lines = 0
        """How many they are."""
        self._lost_last = 0
        """Lines lost for want of room since the last one that is in the queue."""
        self._is_closed = False
        # The thread's own; the other one only reads whether lines are being lost.
        self._lost = 0
        self._why = ""
        self._is_cut = is_cut
        # A daemon thread, because it may hang in a write when the program ends.
        self._thread: Final = threading.Thread(target=self._run, name="sink", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # all that Python says of it
            raise SyscallError("pthread_create(3)", errno.EAGAIN) from error

    def write(self, line: bytes | Callable[[], bytes]) -> None:
        """
        Have a line written, its end included; never raises, and waits `wait_s` at most.

        Args:
            line: The line, or what makes it in this sink's thread, and must not raise.
        """
        size = len(line) if isinstance(line, bytes) else UNMADE_BYTES
        with self._changed:
            if self._is_closed:
                return
            if self._bytes and self._bytes + size > QUEUE_BYTES_MAX:
                self._lost_last += 1
                is_first = self._lost_last == 1
            else:
                self._queue.append(_QueuedLine(self._lost_last, line, size))
                self._bytes += size
                self._lines += 1
                self._lost_last, is_first = 0, False
                if self._wait_s or len(self._queue) == 1 or self._bytes > QUEUE_BYTES_MAX // 2:
                    self._changed.notify_all()
                # Not while an earlier line waits: that one has had its time already.
                if self._wait_s and self._bytes == size and not self._lost:
                    self._changed.wait_for(lambda: not self._bytes, self._wait_s)
        if is_first and not self._lost:
            self._tell(0, SLOW_READER)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """
        Write what waits, as far as that is possible in time, and take no more lines. Idempotent.

        Returns:
            Whether the thread has ended. If not, it hangs in a write, and the file is still its.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        self._tell(self._lost + self._lost_last + self._lines, self._why or SLOW_READER)
        return False

    def _run(self) -> None:
        while lines := self._take():
            for part in _split(lines):
                self._put(part)
            with self._changed:
                self._bytes -= sum(line.size for line in lines)
                self._lines -= len(lines)
                self._changed.notify_all()
        if self._lost or self._lost_last:
            self._tell(self._lost + self._lost_last, self._why or SLOW_READER)

    def _take(self) -> list[_QueuedLine]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if not (self._wait_s or self._is_closed):
                self._changed.wait(GATHER_S)
            lines, self._queue = self._queue, []
            return lines

    def _put(self, lines: list[_QueuedLine]) -> None:
        """Write lines that belong together; count those that cannot be written."""
        if lines[0].lost_before:
            self._lost += lines[0].lost_before
            self._why = SLOW_READER
        preface = self._preface(self._lost, self._why) if self._lost and self._preface else b""
        begin = b"\n" * self._is_cut + preface
        texts = (each if isinstance(each, bytes) else each() for _, each, _ in lines)
        data = begin + b"".join(texts)
        written, error = self._write(data)
        if written:
            self._is_cut = data[written - 1 : written] != b"\n"
        if error is None:
            before, self._lost = self._lost, 0
            if before:
                self._tell(before, self._why)
            return
        is_first = not self._lost
        if preface and written >= len(begin):
            self._lost = 0  # it has been told
        self._lost += len(lines) - data.count(b"\n", len(begin), written)
        self._why = str(error)
        if is_first:
            self._tell(0, self._why)

    def _write(self, data: bytes) -> tuple[int, SyscallError | None]:
        """Write all of it; return how much was written, and why not more."""
        written = 0
        while written < len(data):
            try:
                written += syscall(os.write, self._fd, memoryview(data)[written:])
            except BlockingIOError:
                # A program that shares the file made it non-blocking. This thread may wait.
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as error:
                return written, SyscallError.of("write(2)", error)
        return written, None

    def _tell(self, count: int, why: str) -> None:
        if self._report is not None:
            self._report(count, why)


def _split(lines: list[_QueuedLine]) -> list[list[_QueuedLine]]:
    """Split lines into parts; each but the first begins with one that some were lost before."""
    parts: list[list[_QueuedLine]] = []
    for line in lines:
        if line.lost_before or not parts:
            parts.append([])
        parts[-1].append(line)
    return parts
