"""Signals of a daemon: SIGTERM and SIGINT stop it, no other one that it can handle ends it.

A provider has no configuration file that it could read again, and its log belongs to what
started it: so SIGHUP, as any other signal that ends a program unless it is handled, is logged and
ignored. Signals of the program's own faults (SIGSEGV, SIGABRT) and of job control (SIGTSTP) keep
their default action.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Final, Self

from transport.calls import syscall
from transport.descriptors import Descriptor

STOPPING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
"""What stops a daemon."""

_FAULTS: Final = frozenset(
    {
        *(signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
        *(signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP),
    }
)
_HARMLESS: Final = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN),
    }
)
"""By default they end nothing, or nothing can be done about it."""

_IGNORED: Final = frozenset({signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTOU})
"""
They say that a write failed, which the write says as well. By SIGTTOU a terminal with `tostop`
would stop a daemon that is in the background and logs to it.
"""

NOTED: Final = frozenset(signal.valid_signals()) - STOPPING - _FAULTS - _HARMLESS - _IGNORED
"""What would end a program that does not handle it: logged, and ignored."""


class Stopped(BaseException):
    """A signal stopped the daemon before it served; no `Exception`, so that no handler takes it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number: Final = number


class Signals:
    """
    The signals of this process, from construction on until it ends; the context is left at the end.

    Until `watch` is called, the first stopping signal raises `Stopped` in the main thread, from the
    constructor too. What the program that started this one has blocked or ignored is neither
    blocked nor ignored here.
    """

    # Keeps DAEMON-4.

    def __init__(self) -> None:
        self._caught: list[int] = []
        self._is_raising = True
        ends = syscall(os.pipe2, os.O_NONBLOCK | os.O_CLOEXEC)
        self._readable, self._writable = map(Descriptor, ends)
        signal.set_wakeup_fd(self._writable.fileno(), warn_on_full_buffer=False)
        for number in STOPPING | NOTED:
            signal.signal(number, self._catch)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def watch(self, stop: Callable[[int], None], note: Callable[[int], None]) -> None:
        """
        Handle signals in the running event loop from now on.

        Args:
            stop: Is told of each stopping signal.
            note: Is told of each of `NOTED`, those included that came before.
        """

        def handle() -> None:
            with suppress(BlockingIOError):
                syscall(os.read, self._readable.fileno(), 4096)
            caught, self._caught = self._caught, []
            for number in caught:
                (stop if number in STOPPING else note)(number)

        self._is_raising = False
        asyncio.get_running_loop().add_reader(self._readable.fileno(), handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The program ends now, and none of them may overtake its exit code.
        for number in STOPPING | NOTED:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._readable.close()
        self._writable.close()

    def _catch(self, number: int, _: FrameType | None) -> None:
        # Runs between any two instructions of the main thread, so it only takes a note. Where an
        # exception comes to nothing (in a finalizer, for example), `watch` finds the note.
        self._caught.append(number)
        if number in STOPPING and self._is_raising:
            self._is_raising = False  # the next one may not interrupt what is being undone
            raise Stopped(number)
