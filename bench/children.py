"""Processes of the benchmark's own: fork, have each do a piece of work, read its result."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn, TypeVar

T = TypeVar("T")


class ChildFailed(Exception):
    """The work of a process raised, or the process was killed; the text says what is known."""


def results_of(*works: Callable[[], T]) -> list[T]:
    """
    Do pieces of work at the same time, each in a process of its own.

    Args:
        works: Each returns what JSON can express.

    Returns:
        Their results, in this order. Every process has ended, also if this raises.

    Raises:
        ChildFailed: one of them has failed.
    """
    children: list[tuple[int, BinaryIO]] = []
    try:
        for work in works:
            children.append(_start(work))
        return [_result(pipe) for _, pipe in children]
    finally:
        for pid, pipe in children:
            pipe.close()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _start(work: Callable[[], Any]) -> tuple[int, BinaryIO]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _work_and_exit(work, writing)
    os.close(writing)
    return pid, os.fdopen(reading, "rb")


def _work_and_exit(work: Callable[[], Any], writing: int) -> NoReturn:
    try:
        try:
            said = {"result": work()}
        except BaseException as error:
            said = {"failure": f"{type(error).__name__}: {error}"}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
    finally:
        # Not the way of the interpreter: what is to be cleaned up is the parent's.
        os._exit(0)


def _result(pipe: BinaryIO) -> Any:
    text = pipe.read()
    if not text:
        raise ChildFailed("it died without a word")
    said = json.loads(text)
    if "failure" in said:
        raise ChildFailed(said["failure"])
    return said["result"]
