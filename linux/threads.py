"""Call a function in a thread: in other namespaces, or so that no signal interrupts it."""

from __future__ import annotations

import _thread
import errno
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from .syscalls import SyscallError

T = TypeVar("T")


class ThreadCall(Generic[T]):
    """
    A call of a function in a thread of its own, which is not waited for when the program ends.

    Args:
        function: What to call.
        on_end: Called in that thread when the function has ended; must not raise.
    """

    def __init__(self, function: Callable[[], T], on_end: Callable[[], object]) -> None:
        self._function: Final = function
        self._on_end: Final = on_end
        self._results: Final[list[T]] = []
        self._errors: Final[list[BaseException]] = []
        self._is_begun = False

    def begin(self) -> None:
        """
        Start the thread.

        Raises:
            SyscallError: EAGAIN, no thread can be started; nothing was called.
        """
        # Not Thread.start(), which can be interrupted before it knows its thread. Here an exception
        # of a signal's handler comes after the call, where Python looks for signals, or before the
        # assignment.
        self._is_begun = True
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError as error:  # all that Python says of it
            self._is_begun = False
            raise SyscallError("pthread_create(3)", errno.EAGAIN) from error

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # raised by `result`
            self._errors.append(error)
        finally:
            self._on_end()

    @property
    def is_under_way(self) -> bool:
        """Whether the function was begun and has not ended."""
        return self._is_begun and not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the function has returned or raised."""
        return bool(self._results or self._errors)

    def result(self) -> T:
        """
        Return what the function returned; it must have ended.

        Raises:
            BaseException: what the function raised.
        """
        if self._errors:
            raise self._errors[0]
        return self._results[0]


def call_in_thread(function: Callable[[], T]) -> T:
    """
    Call a function in a thread that ends with it, and wait for that.

    What a signal's handler raises meanwhile is raised here once the function has returned: what it
    uses is not taken from it. A second exception does not wait.

    Returns:
        What the function returned.

    Raises:
        SyscallError: EAGAIN, no thread can be started; the function was not called.
        BaseException: what the function raised.
    """
    # A lock, because Thread.join() can be interrupted in a way that it does not survive.
    ended = _thread.allocate_lock()
    ended.acquire()
    call = ThreadCall(function, ended.release)
    try:
        call.begin()
        ended.acquire()
    except BaseException:
        # It may have come when the lock was acquired already: then there is none to release it.
        if call.is_under_way:
            ended.acquire()
        raise
    return call.result()
