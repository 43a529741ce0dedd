"""`nshandoff serve`, with a hand on it: its work is held up, and its time passes, when it is told so.

It is the program as it stands; only its backend is on reins, and its clock can be put forward. What
to do comes as lines of JSON on standard input, `[verb, ...]`; each is answered with an empty line
once it is done. The first line names the work that is held up from the start.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from handoffs import Work
from liar import wait_until
from stateful_reins import Reins

from linux import cli, cli_serve
from statemachine import events as on
from statemachine.effects import Timer
from transport.contract import Backend
from transport.serve import Provider


class Hand:
    """What holds the program."""

    def __init__(self, held: list[str]) -> None:
        self._held = held
        self._ahead_s = 0.0
        self._open_backend = cli_serve._backend
        self.reins: Reins
        self.provider: Provider

    def monotonic(self) -> float:
        """Be the program's `time`, of which it uses nothing else."""
        return time.monotonic() + self._ahead_s

    def open_backend(self, options: Namespace, stack: ExitStack) -> Backend:
        self.reins = Reins(self._open_backend(options, stack))
        for work in self._held:
            self.reins.hold(Work[work])
        return self.reins

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
        self.reins.hold(Work[work])

    def let_go(self, work: str) -> None:
        self.reins.let_go(Work[work])

    def expire(self, timer: str, name: str) -> None:
        key = (Timer[timer], name)
        handles = self.provider._clock.handles

        def run_out() -> None:
            handles[key].cancel()
            self.provider._expire(*key)

        wait_until(lambda: key in handles, f"{timer} of {name}")
        self._in_loop(run_out)

    def release(self, name: str) -> None:
        self._in_loop(lambda: self.provider._feed(on.ReleaseRequested(name)))

    def put_forward(self, seconds: float) -> None:
        self._ahead_s += seconds
        self._in_loop(self.provider._untidy.set)

    def _in_loop(self, act: Any) -> None:
        done = threading.Event()

        def acted() -> None:
            act()
            done.set()

        self.provider._loop.call_soon_threadsafe(acted)
        assert done.wait(10.0), "the provider does not get round to it"


def main() -> int:
    with open(0, "rb", buffering=0, closefd=False) as told:
        hand = Hand(json.loads(told.readline()))
    replaced: Any = cli_serve
    replaced._backend = hand.open_backend
    replaced.Provider = hand.make_provider
    replaced.time = hand
    threading.Thread(target=hand.obey, daemon=True).start()
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
