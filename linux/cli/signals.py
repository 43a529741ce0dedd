"""Signals of a daemon: SIGTERM and SIGINT stop it, no other one that it can handle ends it.

A provider has no configuration file that it could read again, and its log belongs to what
started it: so SIGHUP, as any other signal that ends a program unless it is handled, is logged and
ignored. Signals of the program's own faults (SIGSEGV, SIGABRT) and of job control (SIGTSTP) keep
their default action.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Final, Self, TypeVar

from statemachine.errors import Copyable
from transport.calls import syscall
from transport.descriptors import Descriptor

from ..threads import ThreadCall

T = TypeVar("T")

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


STOP_TIMEOUT_S: Final = 5.0
"""How long a stop waits for a start that has begun; what takes longer hangs."""


class Stopped(Copyable, Exception):
    """
    A signal stopped the daemon before it served.

    Attributes:
        number: Of the signal.
        has_hung: Whether what was being done goes on all the same, in a thread that cannot be
            ended. The program leaves with `os._exit` then.
    """

    def __init__(self, number: int, *, has_hung: bool) -> None:
        super().__init__(number)
        self.number: Final = number
        self.has_hung: Final = has_hung


class Signals:
    """
    The signals of this process, from construction on until it ends; the context is left at the end.

    None of them interrupts anything: each is noted when it comes, and handled by `wait_for` until
    `watch` is called, and in the event loop from then on. What the program that started this one
    has blocked or ignored is neither blocked nor ignored here.
    """

    # Keeps DAEMON-4.

    def __init__(self) -> None:
        self._caught: list[int] = []
        ends = syscall(os.pipe2, os.O_NONBLOCK | os.O_CLOEXEC)
        self._readable, self._writable = map(Descriptor, ends)
        signal.set_wakeup_fd(self._writable.fileno(), warn_on_full_buffer=False)
        for number in STOPPING | NOTED:
            signal.signal(number, self._catch)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def wait_for(self, function: Callable[[], T]) -> T:
        """
        Call a function in a thread, and wait for its end or for a stopping signal.

        An exception that a signal's handler raised could come between any two instructions, and
        leave a lock taken or a process that has no owner. So the function is never interrupted.

        Returns:
            What the function returned.

        Raises:
            Stopped: a stopping signal came, before or meanwhile. The function has ended, unless
                that took longer than `STOP_TIMEOUT_S`.
            SyscallError: EAGAIN, no thread can be started; the function was not called.
            BaseException: what the function raised.
        """
        self._raise_if_stopped()
        call = ThreadCall(function, self._wake)
        call.begin()
        while not (call.has_ended or self._stopping_number):
            self._wait(None)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while not call.has_ended and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)
        self._raise_if_stopped(has_hung=not call.has_ended)
        return call.result()

    def watch(self, stop: Callable[[int], None], note: Callable[[int], None]) -> None:
        """
        Handle signals in the running event loop from now on.

        Args:
            stop: Is told of each stopping signal.
            note: Is told of each of `NOTED`, those included that came before.
        """

        def handle() -> None:
            self._drain()
            caught, self._caught = self._caught, []
            for number in caught:
                (stop if number in STOPPING else note)(number)

        loop = asyncio.get_running_loop()
        loop.add_reader(self._readable.fileno(), handle)
        loop.call_soon(handle)  # of what came before, the pipe may be read already

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
        self._caught.append(number)

    @property
    def _stopping_number(self) -> int | None:
        return next((number for number in self._caught if number in STOPPING), None)

    def _raise_if_stopped(self, *, has_hung: bool = False) -> None:
        if (number := self._stopping_number) is not None:
            raise Stopped(number, has_hung=has_hung)

    def _wait(self, timeout_s: float | None) -> None:
        """Wait until a signal comes, a call ends, or the time is over."""
        poll = select.poll()
        poll.register(self._readable.fileno(), select.POLLIN)
        poll.poll(None if timeout_s is None else timeout_s * 1000)
        self._drain()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            syscall(os.read, self._readable.fileno(), 4096)

    def _wake(self) -> None:
        # A full pipe wakes as well, and if it is closed there is none to be woken.
        with suppress(BlockingIOError, ValueError):
            syscall(os.write, self._writable.fileno(), b"\0")
