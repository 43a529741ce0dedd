"""What the tests of the command share: running it, and a real daemon with a place of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from linux.cgroups import Scope
from linux.features import Features
from linux.journal import Entry, read_journal
from linux.namespaces import KernelInspector
from linux.recovery import state_noted
from linux.sinks import GATHER_S
from statemachine import AllocationNotFound, NamespaceRequest, NamespaceType
from transport.request import Consumer, Handoff
from transport.testing.peer import DEADLINE_S, wait_until

ROOT: Final = Path(__file__).parents[2]
COMMAND: Final = (sys.executable, "-m", "linux")
INSTALLED: Final = str(Path(sys.executable).with_name("nshandoff"))


PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **more}


def run_program(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; it finds these packages, and what it says is text."""
    settings: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "env": environment(),
        "timeout": DEADLINE_S,
        **how,
    }
    return subprocess.run(
        list(map(str, words)), check=False, capture_output=True, text=True, **settings
    )


def nshandoff(
    *words: str | Path, within: Sequence[str | Path] = (), **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `within`: a program that executes it, with its words."""
    return run_program(*within, *COMMAND, *words, **how)


@contextmanager
def running(*words: str | Path, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Have the command running; it is killed and waited for in the end, if it still is."""
    settings: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": environment(),
        **how,
    }
    command = settings.pop("command", COMMAND)
    with subprocess.Popen([*command, *map(str, words)], text=True, **settings) as program:
        try:
            yield program
        finally:
            if program.poll() is None:
                program.kill()


LINES_SHOWN: Final = 60
"""Of a log, where a test says what there was."""


class Daemon:
    """
    A provider in a directory of its own: as a program, or between two of its lives.

    Args:
        directory: Where its socket, state and log are.
        image_root: Where its images are.
        options: More words for its command line.
        prefix: A program that executes it, with its words: env(1), prlimit(1).
        stderr: Where it logs to; lent. None for `log`.
    """

    def __init__(
        self,
        directory: Path,
        image_root: Path,
        *options: str,
        prefix: tuple[str, ...] = (),
        stderr: int | None = None,
    ) -> None:
        self.socket = directory / "handoff.sock"
        self.state_dir = directory / "state"
        self.uenv_base = directory / "uenv"
        self.log = directory / "log"
        self.ready = self.state_dir / "ready"
        self.program: subprocess.Popen[bytes] | None = None
        self.prefix = prefix
        self.stderr = stderr
        self.places = ("--image-root", str(image_root), "--uenv-base", str(self.uenv_base))
        self.options = options

    @property
    def words(self) -> tuple[str, ...]:
        here = ("--socket", str(self.socket), "--state-dir", str(self.state_dir))
        return ("serve", *here, *self.places, "--hold-time", "0", *self.options)

    @property
    def pid(self) -> int:
        assert self.program is not None
        return self.program.pid

    def start(self, **more: str) -> None:
        """Start it and wait until it is ready."""
        self.begin(**more)
        wait_until(self._is_ready)

    def begin(self, **more: str) -> None:
        """Start it, and do not wait."""
        with self.log.open("ab") as log:
            self.program = subprocess.Popen(
                [*self.prefix, *COMMAND, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if self.stderr is None else self.stderr,
                env=environment(**more),
            )

    def is_running(self) -> bool:
        return self.program is not None and self.program.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and wait for its end; what does not end is killed."""
        program, self.program = self.program, None
        assert program is not None
        program.send_signal(number)
        try:
            return program.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            raise AssertionError(
                f"signal {number} did not end it:\n{self.log.read_text()}"
            ) from None

    def events(self, allocation_id: str | None = None) -> list[dict[str, Any]]:
        """What it has said so far, of one allocation or of all."""
        # Lines are gathered before they are written: it is read until no more come.
        text = None
        while text != (text := self.log.read_text()):
            time.sleep(5 * GATHER_S)
        lines = [json.loads(line) for line in text.splitlines()]
        return [x for x in lines if allocation_id in (None, x.get("allocation_id"))]

    def moves(self, allocation_id: str) -> list[tuple[str, str]]:
        """From which state to which an allocation went, as far as it has been said."""
        rows = [(line["from"], line["to"]) for line in self.events(allocation_id) if "from" in line]
        return [(before, after) for before, after in rows if before != after]

    def consumer(self) -> Consumer:
        return Consumer(self.socket, KernelInspector(Features.probe()))

    def obtain(
        self, allocation_id: str, *kinds: NamespaceType, image: str | None = None
    ) -> Handoff:
        return self.consumer().obtain(NamespaceRequest(allocation_id, kinds, image))

    def states(self) -> dict[str, str]:
        """The allocations that its journal has, and the state of each."""
        return {x.allocation_id: _state_of(x) for x in read_journal(self.state_dir).entries}

    def alive(self) -> list[str]:
        """The allocations that its journal has."""
        return list(self.states())

    def clear(self) -> None:
        """End whatever is alive, with a program to do it."""
        if not self.is_running():
            self.start()
        for name in self.alive():
            with suppress(AllocationNotFound):
                self.consumer().end(name, DEADLINE_S)
        self.wait_until_none_is_alive()

    def wait_until_none_is_alive(self) -> None:
        """Wait until its journal is empty; if it stays as it is, say what there is, and the log."""
        try:
            wait_until(lambda: not self.alive())
        except AssertionError:
            said = "\n".join(self.log.read_text().splitlines()[-LINES_SHOWN:])
            raise AssertionError(f"these stay: {self.states()}\n{said}") from None

    def _is_ready(self) -> bool:
        assert self.program is not None
        assert self.program.poll() is None, self.log.read_text()
        with suppress(FileNotFoundError, ValueError):
            return bool(json.loads(self.ready.read_text())["pid"] == self.program.pid)
        return False


def _state_of(entry: Entry) -> str:
    path = entry.scope_path
    scope = None if path is None else Scope.at(Path(path), entry.incarnation)
    return state_noted(entry, scope).value


@contextmanager
def daemon_in(directory: Path, image_root: Path, *options: str, **how: Any) -> Iterator[Daemon]:
    """Have a daemon, started; afterwards what it made is gone, and it itself, with exit code 0."""
    daemon = Daemon(directory, image_root, *options, **how)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.clear()
        assert daemon.stop() == 0


@contextmanager
def warm_daemon_in(directory: Path, image_root: Path, *options: str) -> Iterator[Daemon]:
    """Have a daemon for several tests, whose forge is not taken for something a test left."""
    with daemon_in(directory, image_root, *options) as daemon:
        with daemon.obtain(f"nsh-test-{os.getpid()}-warm") as handoff:
            assert handoff.end(DEADLINE_S)
        yield daemon


@pytest.fixture(name="daemon", scope="module")
def warm_daemon(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Iterator[Daemon]:
    """For a module that imports it; what takes long to be released is said soon."""
    directory = tmp_path_factory.mktemp("daemon")
    with warm_daemon_in(directory, image_root, "--release-deadline", "0.3") as daemon:
        yield daemon


def identities_of(received: Mapping[str, Any]) -> dict[str, int]:
    """Inode by type, of what `request --json` or `list --json` shows."""
    shown = received.get("descriptors", received.get("namespaces", []))
    return {one["type"]: one["inode"] for one in shown}
