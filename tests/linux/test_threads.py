"""What runs in a thread of its own is waited for, whatever interrupts."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from linux import threads
from linux.syscalls import SyscallError
from linux.threads import call_in_thread


class RaisedByHandler(Exception):
    """Raised by a signal's handler."""


def test_basic_what_it_returns_and_raises_is_the_callers() -> None:
    assert call_in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 // 0)


def test_what_interrupts_the_caller_waits_for_the_function() -> None:
    def interrupt(*_: int | FrameType | None) -> None:
        raise RaisedByHandler

    def function() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(0.1)
        done.append(True)

    done: list[bool] = []
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(RaisedByHandler):
            call_in_thread(function)
        assert done
    finally:
        signal.signal(signal.SIGUSR1, before)


class RaisingLock:
    """A lock whose second acquisition raises when it has been acquired, as a handler may."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._count = 0

    def acquire(self) -> None:
        self._lock.acquire()
        self._count += 1
        if self._count == 2:
            raise RaisedByHandler

    def release(self) -> None:
        self._lock.release()


def start_and_raise(function: Callable[[], None], arguments: tuple[()]) -> None:
    _thread.start_new_thread(function, arguments)
    raise RaisedByHandler


@pytest.mark.parametrize(
    "replaced",
    [{"allocate_lock": RaisingLock}, {"start_new_thread": start_and_raise}],
    ids=["the wait", "the start"],
)
def test_what_interrupts_between_two_instructions_waits_for_the_function_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, replaced: dict[str, Any]
) -> None:
    def function() -> None:
        time.sleep(0.05)
        done.append(True)

    done: list[bool] = []
    now = {"allocate_lock": _thread.allocate_lock, "start_new_thread": _thread.start_new_thread}
    monkeypatch.setattr(threads, "_thread", SimpleNamespace(**{**now, **replaced}))
    with pytest.raises(RaisedByHandler):
        call_in_thread(function)
    assert done


def test_where_no_thread_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    # Only there: what else runs in this process may need a thread meanwhile.
    mine = SimpleNamespace(allocate_lock=_thread.allocate_lock, start_new_thread=refuse)
    monkeypatch.setattr(threads, "_thread", mine)
    with pytest.raises(SyscallError, match=r"pthread_create\(3\)"):
        call_in_thread(threading.get_ident)
