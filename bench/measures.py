"""What is measured of our provider and consumer, and of the floor beside it, a round at a time.

A `Taken` has every value, by what was measured and whose it is, round by round. Times are in
microseconds unless the name says otherwise.
"""

from __future__ import annotations

import itertools
import os
import resource
import select
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bench.children import results_of
from bench.ends import end_all
from bench.fairness import connect
from bench.floor import Floor
from bench.usage import cgroup_of, cgroup_us, forge_of, own_processor_us, processor_us, wake_ups
from linux.consumer import find_scope
from linux.features import Features
from linux.forge.spawn import spawn_within
from linux.namespaces import KernelInspector
from linux.survey import survey_node
from linux.testing.worlds import SCOPE_PREFIX
from statemachine import NamespaceRequest, NamespaceType
from transport.request import Consumer, Handoff
from transport.testing.peer import frame_of

KINDS: Final = (NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT)
PARALLEL: Final = 2
"""Consumer processes of the sustained rate; those of the floor's `_par2`."""

TENTHS: Final = 10
WHILE_POPULATED_S: Final = 0.03
"""How long a process stays in its cgroup: the Linux kernel reports two changes in a row late."""

ENDED_TIMEOUT_S: Final = 10.0
POOL_TIMEOUT_S: Final = 30.0
POOL_POLL_S: Final = 0.02
ALL_TIMEOUT_S: Final = 60.0
"""How long all that ask at once may wait for the last answer."""

ANSWER_BYTES_MAX: Final = 65_536
SETTLE_S: Final = 0.02
"""Until the provider has written down what it has confirmed, which is part of a life."""

_numbers = itertools.count()


class Counts(NamedTuple):
    """How many of each thing are done in a round, or in the part after all rounds."""

    rounds: int = 30
    lives: int = 20
    sustained: int = 30
    again: int = 30
    pooled: int = 20
    peers: int = 2
    emptied: int = 4
    spawned: int = 4
    many: int = 1000
    many_rounds: int = 3
    idle_s: float = 5.0


QUICK: Final = Counts(2, 2, 2, 2, 2, 1, 1, 1, 20, 1, 0.2)
"""As few as show that everything works."""


class Taken:
    """What was measured, by name and by whose it is."""

    def __init__(self) -> None:
        self.rounds: defaultdict[tuple[str, str], list[list[float]]] = defaultdict(list)

    def add(self, name: str, whose: str, values: list[float]) -> None:
        """Add the values of one round."""
        self.rounds[name, whose].append(values)


class Measured:
    """
    A provider that runs, and the floor.

    Args:
        socket: Where the provider listens.
        provider: Its process.
        pooled: The folder of another one, which makes `Counts.pooled` anchors ahead.
        cgroup2: Where cgroup v2 is mounted.
        floor: Compiled.
        counts: How many of each.
        taken: Filled.
    """

    def __init__(
        self,
        socket: Path,
        provider: int,
        pooled: Path,
        cgroup2: Path,
        floor: Floor,
        counts: Counts,
        taken: Taken,
    ) -> None:
        self._path, self._pooled = socket, pooled
        self._floor, self._counts = floor, counts
        self._provider, self._forge = provider, forge_of(provider)
        self._anchors = cgroup_of(self._forge, cgroup2)
        self._features = Features.probe()
        self._consumer = Consumer(socket, KernelInspector(self._features))
        self.taken: Final = taken

    def in_rounds(self) -> dict[str, Callable[[], None]]:
        """Name what is measured in every round; both sides of a comparison are neighbours."""
        return {
            "life, floor": self.floor_lives,
            "life": self.lives,
            "sustained": self.sustained,
            "sustained, floor": self.floor_sustained,
            "ask again, floor": self.floor_again,
            "ask again": self.again,
            "kept connection": self.kept_connection,
            "pool": self.from_pool,
            "emptied": self.emptied,
            "spawn": self.spawned,
        }

    def after_rounds(self) -> dict[str, tuple[int, Callable[[], None]]]:
        """Name what is measured then, and how often."""
        repeats = self._counts.many_rounds
        return {
            "at once": (repeats, self.at_once),
            "alive": (repeats, self.alive),
            "alive, floor": (repeats, self.floor_alive),
            "idle": (1, self.idle),
        }

    # One life after the other.

    def lives(self) -> None:
        """Create and end, and what processor time that takes."""
        before = self._processor()
        create, life = _lives(self._path, self._counts.lives)
        time.sleep(SETTLE_S)
        after = self._processor()
        self.taken.add("create", "ours", create)
        self.taken.add("release", "ours", [b - a for a, b in zip(create, life, strict=True)])
        self.taken.add("life", "ours", life)
        parts = {name: (after[name] - before[name]) / len(life) for name in after}
        parts["anchors"] -= parts["forge"]
        for name, used in parts.items():
            self.taken.add(f"processor, {name}", "ours", [used])
        self.taken.add("processor", "ours", [sum(parts.values())])

    def floor_lives(self) -> None:
        ran = self._floor.run("create_whole", self._counts.lives)
        create, release = ran["handoff_us"], ran["release_us"]
        parts = {"provider": ran["provider_cpu_us"], "consumer": ran["consumer_cpu_us"]}
        self.taken.add("create", "floor", create)
        self.taken.add("release", "floor", release)
        self.taken.add("life", "floor", [a + b for a, b in zip(create, release, strict=True)])
        for name, used in parts.items():
            self.taken.add(f"processor, {name}", "floor", [used])
        self.taken.add("processor", "floor", [sum(parts.values())])

    def _processor(self) -> dict[str, float]:
        return {
            "provider": processor_us(self._provider),
            "forge": processor_us(self._forge),
            "anchors": cgroup_us(self._anchors),  # still with the forge
            "consumer": own_processor_us(),
        }

    # Two consumers.

    def sustained(self) -> None:
        count = self._counts.sustained
        work = partial(_timed_lives, self._path, count)
        seconds = max(results_of(*[work] * PARALLEL))
        self.taken.add("sustained, a second", "ours", [PARALLEL * count / seconds])

    def floor_sustained(self) -> None:
        ran = self._floor.run("create_whole_par2", self._counts.sustained)
        self.taken.add("sustained, a second", "floor", [ran["per_s"]])

    # Asking again.

    def again(self) -> None:
        """Ask for a living allocation, on a new connection each time."""
        with self._obtain("again") as held:
            times = []
            for _ in range(self._counts.again):
                started = time.perf_counter()
                self._consumer.obtain(held.request).close()
                times.append(_us_since(started))
            held.end()
        self.taken.add("ask again", "ours", times)

    def floor_again(self) -> None:
        for scenario in ("socket", "pool"):
            ran = self._floor.run(scenario, self._counts.again)
            self.taken.add("ask again", scenario, ran["handoff_us"])

    # On a connection that is there, and from anchors that are.

    def kept_connection(self) -> None:
        """Create and end, all on one connection."""
        create, life = _lives(self._path, self._counts.lives, keeps=1)
        self.taken.add("create, kept connection", "ours", create)
        self.taken.add("life, kept connection", "ours", life)

    def from_pool(self) -> None:
        """Create from anchors made ahead: on new connections, and on one."""
        for keeps, words in enumerate(("create from pool", "create from pool, kept connection")):
            self._await_pool()
            create, _ = _lives(self._pooled / "handoff.sock", self._counts.pooled, keeps=keeps)
            self.taken.add(words, "ours", create)

    def _await_pool(self) -> None:
        deadline = time.monotonic() + POOL_TIMEOUT_S
        while survey_node(self._pooled / "state", self._features).ahead < self._counts.pooled:
            if time.monotonic() > deadline:
                raise TimeoutError("a pool is not filled")
            time.sleep(POOL_POLL_S)

    # What a workload sees.

    def emptied(self) -> None:
        """From the Linux kernel's word that a cgroup is empty to the end of its allocation."""
        self.taken.add("emptied", "ours", [self._emptied() for _ in range(self._counts.emptied)])

    def _emptied(self) -> float:
        with self._obtain("emptied") as handoff:
            scope = find_scope(self._path, handoff.request.allocation_id)
            assert scope is not None, "this provider makes scopes"
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
                (scope / "cgroup.procs").write_text(str(process.pid))
                time.sleep(WHILE_POPULATED_S)
                with (scope / "cgroup.events").open("rb", buffering=0) as events:
                    started = _await_empty(events.fileno(), process)
            if not handoff.wait_ended(ENDED_TIMEOUT_S):
                raise TimeoutError("an allocation whose cgroup is empty does not end")
            return _us_since(started)

    def spawned(self) -> None:
        """Run `true` in handed-over namespaces: by our own means, and by nsenter(1)."""
        ours, nsenter = [], []
        with self._obtain("spawned") as handoff:
            for _ in range(self._counts.spawned):
                started = time.perf_counter()
                with spawn_within(["true"], handoff.bundle) as child:
                    child.wait()
                ours.append(_us_since(started))
                nsenter.append(_nsenter(handoff))
            handoff.end()
        self.taken.add("spawn", "ours", ours)
        self.taken.add("spawn", "nsenter", nsenter)

    # Many.

    def at_once(self) -> None:
        """Have as many requests as are wanted wait at the same time, each on a connection."""
        names = [_new_name("once") for _ in range(self._counts.many)]
        lines = {}
        try:
            for name in names:
                lines[name] = connect(self._path)
            seconds, served = _ask_all(lines)
        finally:
            for line in lines.values():
                line.close()
        end_all(self._path, names)
        self.taken.add("at once, s", "ours", [seconds])
        self.taken.add("at once, served", "ours", [served])

    def alive(self) -> None:
        """Create allocations that stay, in tenths."""
        names = [_new_name("alive") for _ in range(self._counts.many)]
        times = []
        for name in names:
            started = time.perf_counter()
            handoff = self._consumer.obtain(NamespaceRequest(name, KINDS))
            times.append(_us_since(started))
            handoff.close()
        end_all(self._path, names)
        self._add_tenths("ours", times)

    def floor_alive(self) -> None:
        ran = self._floor.run("create_whole_keep", self._counts.many)
        self._add_tenths("floor", ran["handoff_us"])

    def _add_tenths(self, whose: str, times: list[float]) -> None:
        size = len(times) // TENTHS
        for tenth in range(TENTHS):
            part = times[tenth * size : (tenth + 1) * size]
            self.taken.add(f"alive, tenth {tenth + 1}", whose, part)

    def idle(self) -> None:
        """Watch the provider and its forge while nothing is asked of them."""
        time.sleep(min(1.0, self._counts.idle_s))
        pids = (self._provider, self._forge)
        wakes, used = sum(map(wake_ups, pids)), sum(map(processor_us, pids))
        time.sleep(self._counts.idle_s)
        self.taken.add("idle, wake-ups", "ours", [float(sum(map(wake_ups, pids)) - wakes)])
        self.taken.add("idle, processor", "ours", [sum(map(processor_us, pids)) - used])

    def _obtain(self, word: str) -> Handoff:
        return self._consumer.obtain(NamespaceRequest(_new_name(word), KINDS))


def allow_descriptors() -> None:
    """Have as many descriptors as may be had, for `at_once`; what is started inherits it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _new_name(word: str) -> str:
    return f"{SCOPE_PREFIX}bench-{word}-{os.getpid()}-{next(_numbers)}"


def _us_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e6


def _lives(path: Path, count: int, keeps: int = 0) -> tuple[list[float], list[float]]:
    """Lead whole lives; from each request until namespaces are in hand, and until they are gone."""
    create, life = [], []
    with Consumer(path, KernelInspector(Features.probe()), keeps=keeps) as consumer:
        for _ in range(count):
            request = NamespaceRequest(_new_name("life"), KINDS)
            started = time.perf_counter()
            with consumer.obtain(request) as handoff:
                create.append(_us_since(started))
                if not handoff.end():
                    raise TimeoutError("an end is not confirmed")
                life.append(_us_since(started))
    return create, life


def _timed_lives(path: Path, count: int) -> float:
    started = time.perf_counter()
    _lives(path, count)
    return time.perf_counter() - started


def _await_empty(events: int, process: subprocess.Popen[bytes]) -> float:
    """End a process, and wait for the Linux kernel to say that its cgroup is empty; say when."""
    assert process.stdin is not None
    with select.epoll() as epoll:
        os.pread(events, 4096, 0)
        epoll.register(events, select.EPOLLPRI)
        process.stdin.close()
        deadline = time.monotonic() + ENDED_TIMEOUT_S
        while time.monotonic() < deadline:
            epoll.poll(ENDED_TIMEOUT_S)
            happened = time.perf_counter()
            try:
                if b"populated 0" in os.pread(events, 4096, 0):
                    return happened
            except OSError:  # the provider was faster, and the cgroup is removed already
                return happened
    raise TimeoutError("a cgroup does not become empty")


def _nsenter(handoff: Handoff) -> float:
    options = [
        f"--{option}=/proc/{os.getpid()}/fd/{handoff.bundle[kind].fileno()}"
        for option, kind in zip(("pid", "net", "mount"), KINDS, strict=True)
    ]
    started = time.perf_counter()
    pid = os.posix_spawnp("nsenter", ["nsenter", *options, "true"], os.environ)
    _, status = os.waitpid(pid, 0)
    if status:
        raise ChildProcessError(f"nsenter ended with status {status}")
    return _us_since(started)


def _ask_all(lines: dict[str, socket.socket]) -> tuple[float, int]:
    """Send all requests, read all answers; seconds until the last, and how many were served."""
    waiting = {line.fileno(): line for line in lines.values()}
    poll, served = select.poll(), 0
    for number in waiting:
        poll.register(number, select.POLLIN)
    frames = {name: frame_of(NamespaceRequest(name, KINDS)) for name in lines}
    started = time.perf_counter()
    for name, line in lines.items():
        line.sendall(frames[name])
    while waiting:
        ready = poll.poll(ALL_TIMEOUT_S * 1000)
        if not ready:
            break
        for number, _ in ready:
            # An answer comes in one piece, with its descriptors.
            _, fds, _, _ = socket.recv_fds(waiting[number], ANSWER_BYTES_MAX, len(KINDS))
            for fd in fds:
                os.close(fd)
            served += len(fds) == len(KINDS)
            poll.unregister(number)
            del waiting[number]
    return time.perf_counter() - started, served
