"""Call a function in a thread of its own, whose namespaces, root and directory it may change."""

from __future__ import annotations

import _thread
import errno
from collections.abc import Callable
from typing import TypeVar

from .syscalls import SyscallError

T = TypeVar("T")


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
    results: list[T] = []
    errors: list[BaseException] = []
    # A lock, because Thread.start() and join() can be interrupted before they know their thread.
    ended = _thread.allocate_lock()
    ended.acquire()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised in the caller's thread
            errors.append(error)
        finally:
            ended.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:  # all that Python says of it
        raise SyscallError("pthread_create(3)", errno.EAGAIN) from error
    try:
        ended.acquire()
    except BaseException:
        ended.acquire()
        raise
    if errors:
        raise errors[0]
    return results[0]
