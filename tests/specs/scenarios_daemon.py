"""`nshandoff serve` with a hand on it: work is held up, and time passes, when it is told so.

It is the program as it stands, but for a gate before its backend and a clock that can be put
forward. What to do comes as lines of JSON on standard input, `[verb, ...]`; each is answered with
an empty line once it is done. The first line names the work that is held up from the start.

It starts often, so it imports little.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from linux.cli import command as cli
from linux.cli import serve as cli_serve
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.messages import NamespaceRequest, NamespaceResponse
from transport.contract import Backend, Recovery
from transport.serve import Provider
from transport.testing.peer import DEADLINE_S, wait_until


class Gate:
    """A backend before which work that is held up waits, in the thread that does it."""

    def __init__(self, backend: Backend, held: set[str]) -> None:
        self._backend = backend
        self._held = held
        self._changed = threading.Condition()

    def hold(self, work: str) -> None:
        with self._changed:
            self._held.add(work)

    def let_go(self, work: str) -> None:
        with self._changed:
            self._held.discard(work)
            self._changed.notify_all()

    def recover(self) -> Recovery:
        self._pass("RECOVER")
        return self._backend.recover()

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        self._pass("CREATE")
        return self._backend.create_namespaces(request)

    def release_namespaces(self, allocation_id: str) -> None:
        self._pass("RELEASE")
        self._backend.release_namespaces(allocation_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def _pass(self, work: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: work not in self._held, DEADLINE_S), work


class Hand:
    """What holds the program."""

    def __init__(self, held: set[str]) -> None:
        self._held = held
        self._ahead_s = 0.0
        self._open_backend = cli_serve._backend
        self.gate: Gate
        self.provider: Provider

    def monotonic(self) -> float:
        """Be the program's `time`, of which it uses nothing else."""
        return time.monotonic() + self._ahead_s

    def open_backend(self, options: Namespace, stack: ExitStack) -> Backend:
        self.gate = Gate(self._open_backend(options, stack), self._held)
        return self.gate

    def make_provider(self, *arguments: Any, **named: Any) -> Provider:
        self.provider = Provider(*arguments, **named)
        return self.provider

    def obey(self) -> None:
        with open(0, "rb", buffering=0, closefd=False) as told:
            while line := told.readline():
                verb, *words = json.loads(line)
                getattr(self, verb)(*words)
                os.write(1, b"\n")

    # What it is told.

    def hold(self, work: str) -> None:
        self.gate.hold(work)

    def let_go(self, work: str) -> None:
        self.gate.let_go(work)

    def expire(self, timer: str, name: str) -> None:
        key = (Timer[timer], name)
        timers = self.provider._timers
        wait_until(lambda: key in timers._running, f"{timer} of {name}")
        self._in_loop(lambda: timers.expire(*key))

    def release(self, name: str) -> None:
        self._in_loop(lambda: self.provider._feed(on.ReleaseRequested(name)))

    def put_forward(self, seconds: float) -> None:
        self._ahead_s += seconds
        work = self.provider._work
        self._in_loop(work.tidy_soon)
        # What it does is done when this command is, or the next one is played before it.
        wait_until(lambda: not work._is_tidying, "tidying up")

    def _in_loop(self, act: Any) -> None:
        done = threading.Event()

        def acted() -> None:
            act()
            done.set()

        self.provider._loop.call_soon_threadsafe(acted)
        assert done.wait(DEADLINE_S), "the provider does not get round to it"


def main() -> int:
    with open(0, "rb", buffering=0, closefd=False) as told:
        hand = Hand({*json.loads(told.readline())})
    replaced: Any = cli_serve
    replaced._backend = hand.open_backend
    replaced.Provider = hand.make_provider
    replaced.time = hand
    threading.Thread(target=hand.obey, daemon=True).start()
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
