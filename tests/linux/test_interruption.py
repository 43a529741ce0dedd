"""`nshandoff run`: it withdraws its request, whatever it does when a signal comes."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

from linux.cli.consumer import INTERRUPTIONS, signals_taken
from linux.cli.exits import Interrupted
from linux.cli.run import _obtain
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import AllocationEnded, NamespaceRequest, NamespaceType
from statemachine.errors import FdPassing
from statemachine.messages import Message
from transport import endpoint
from transport.channel import Delivery
from transport.request import Consumer
from transport.testing.peer import wait_until

ROOT: Final = Path(__file__).parents[2]
OURS: Final = tuple(f"{ROOT / package}/" for package in ("linux", "statemachine", "transport"))

EVERY: Final = 4
"""Of how many lines one is tried; what lasts from a system call to the next has more."""

LINES_MIN: Final = 300
"""How many lines it has before the answer is awaited, at the least."""

TOO_LATE: Final = 0
"""How a process ends that awaits the answer before it has come to the line."""


@pytest.mark.clause("RUN-6")
def test_interruption_before_any_line_withdraws_the_request(
    tmp_path: Path, allocation_id: str
) -> None:
    """Of a provider that confirms each end, and answers no request."""
    wanted = NamespaceRequest(allocation_id, tuple(NamespaceType))
    ended = AllocationEnded(allocation_id)
    for line in itertools.count(1, EVERY):
        told, code = _try(line, tmp_path / str(line), wanted)
        if code == TOO_LATE:
            break
        assert (code, told[-1]) == (signal.SIGTERM, [ended]), (line, told)
        assert all(each in ([], [ended], [wanted], [wanted, ended]) for each in told), (line, told)
    assert line > LINES_MIN


def _try(line: int, path: Path, wanted: NamespaceRequest) -> tuple[list[list[Message]], int]:
    """Return what a process told on each connection, and its exit code."""
    connections: list[tuple[endpoint.Accepted, list[Message]]] = []

    def serve() -> bool:
        if (accepted := listener.accept()) is not None:
            connections.append((accepted, []))
        pid, status = os.waitpid(child, os.WNOHANG)
        for taken, heard in connections:
            for received in () if taken.channel.closed else taken.channel.receive():
                if isinstance(received, Delivery):
                    heard.append(received.message)
                if heard and isinstance(heard[-1], AllocationEnded):
                    with suppress(FdPassing):  # of what withdraws, not all wait for that
                        taken.channel.send(heard[-1])
        codes.extend([os.waitstatus_to_exitcode(status)] if pid else [])
        return bool(codes)

    codes: list[int] = []
    with endpoint.listen(path) as listener:
        if (child := os.fork()) == 0:
            _obtain_and_exit(line, path, wanted)
        try:
            wait_until(serve)
        finally:
            if not codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            for taken, _ in connections:
                taken.close()
    return [heard for _, heard in connections], codes[0]


def _obtain_and_exit(line: int, path: Path, wanted: NamespaceRequest) -> None:
    """Obtain, with a signal before the K-th line of the packages; exit with its number."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "call" and frame.f_code.co_name == "_wait" and next(lines) <= line:
            os._exit(TOO_LATE)
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

    try:
        with signals_taken(INTERRUPTIONS) as taken:
            consumer = Consumer(path, KernelInspector(Features()))
            sys.settrace(trace)
            _obtain(consumer, wanted, None, taken, withdraws=True)
    except Interrupted as interruption:
        os._exit(interruption.number)
    finally:
        os._exit(1)
