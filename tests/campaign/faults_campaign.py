"""The part of a campaign that has system calls fail: all of them, in every way, on both backends.

A task is a life, a backend, a kind of plan and a share of the plans; a share has the same plans
whenever it is asked for. Single faults, kills, short transfers and deaths are complete at every
scale but on Linux, where a scale below 1 takes some, as it does of interferences; pairs and random
kills are drawn, more of them with scale.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.campaign.outcome import Discovery, Outcome, Task
from tests.suites.faults.crashes import CONSUMERS, PHASES, DoomableProgram, Killed, dropped, killed
from tests.suites.faults.faults import (
    CallSite,
    Fault,
    FaultPlan,
    errnos_of,
    faults_of,
    kills_of,
    short_faults_of,
)
from tests.suites.faults.interference import interferences_of
from tests.suites.faults.lives import (
    ALL_LIVES,
    LIVES,
    FaultSetup,
    LinuxStage,
    linux_stage,
    simulated_stage,
)
from tests.suites.faults.traced import THREADS, Traced
from tests.suites.test_strace import POINTS, survive
from tests.support.census import Session
from tests.support.isolation import find_cgroup2
from tests.support.programs import warm_daemon_in

BACKENDS: Final = ("simulated", "linux")
POOLED: Final = "linux with a pool"
BY_STRACE: Final = "linux, by strace: "
"""In the place of a backend, before whose calls are the last."""
SINGLES_ON_LINUX: Final = 4_000
"""At scale 1: all there are."""
PAIRS: Final = {"simulated": 50_400, "linux": 0}
"""At scale 1."""
SHARE: Final = {"simulated": 2_500, "linux": 250}
"""Most plans of one task."""
ASKED_AFTERWARDS: Final = 8
"""After how many pairs the provider is asked something else; every life asks it, too."""
KILLS: Final = 2_000
"""At scale 1, at random."""
KILLS_SHARE: Final = 50


_POWERS: Final = {
    **{("simulated", life): 1 for life in ALL_LIVES},
    **{("linux", life): 2 for life in ALL_LIVES},
    ("linux", "recovered"): 4,
}
"""
With which power of the scale the share of interferences goes: on Linux there are 25,000, and those
of a life with two programs take half a second or more each.
"""


def tasks(scale: float) -> list[Task]:
    """Everything at the given scale, in tasks of at most some ten seconds."""
    found = [_task("simulated", life, "single", 1.0) for life in LIVES]
    part = min(1.0, scale * SINGLES_ON_LINUX / 4_000)
    found += [_task("linux", life, kind, part) for kind in ("single", "kills") for life in LIVES]
    found += [_task(POOLED, life, "single", part / 4) for life in LIVES]
    found += [_task(backend, life, "short", 1.0) for backend in BACKENDS for life in LIVES]
    found += [
        _task(backend, life, "interferences", part ** _POWERS[backend, life])
        for backend in BACKENDS
        for life in ALL_LIVES
    ]
    pairs = {"simulated": PAIRS["simulated"] * scale, "linux": max(0.0, scale - 1) * 1_000}
    for backend, life in itertools.product(BACKENDS, LIVES):
        left = round(pairs[backend] / len(LIVES))
        for share in itertools.count():
            if left <= 0:
                break
            count = min(left, SHARE[backend])
            found.append(_task(backend, life, "pairs", 1.0, count=count, share=share))
            left -= count
    found += [
        Task(f"faults: deaths while {phase} on {backend}", _of(backend, phase, "deaths", scale))
        for backend in (*BACKENDS, POOLED)
        for phase in (*PHASES, *(CONSUMERS if backend == "linux" else ()))
    ]
    found += [
        Task(
            f"faults: deaths while {phase}, below Python, {who}",
            _of(f"{BY_STRACE}{who}", phase, "deaths", scale / 2),
        )
        for phase, threads in THREADS.items()
        for who in threads
    ]
    found += [
        Task(
            f"faults: kills at random, share {share}",
            {**_of("linux", "all", "random", 1.0), "count": KILLS_SHARE, "share": share},
        )
        for share in range(round(KILLS * scale / KILLS_SHARE))
    ]
    found += [
        Task(f"faults: strace, {sort}", {"kind": "strace", "life": sort, "backend": "daemon"})
        for sort in POINTS
    ]
    return found


def _task(backend: str, life: str, kind: str, part: float, **more: int) -> Task:
    share = f", share {more['share']}" if "share" in more else ""
    return Task(
        f"faults: {kind}, {life} on {backend}{share}", {**_of(backend, life, kind, part), **more}
    )


def _of(backend: str, life: str, kind: str, part: float) -> dict[str, Any]:
    return {"backend": backend, "life": life, "kind": kind, "part": part}


def run(
    seed: int,
    *,
    backend: str,
    life: str,
    kind: str,
    part: float = 1.0,
    count: int = 0,
    share: int = 0,
) -> Outcome:
    """One task; what it finds broken is in the outcome, with the command that shows it again."""
    logging.getLogger().addHandler(logging.NullHandler())  # what is refused is warned of
    began = time.monotonic()
    with ExitStack() as stack:
        Session()  # so that processes of ours can be told from others
        place = StageDir(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nsh-test-"))))
        if kind == "strace":
            outcome = _strace(place, life)
        elif kind == "deaths":
            outcome = _deaths(place, backend, life, part, seed)
        elif kind == "random":
            outcome = _kills_at_random(place, f"{seed}-{share}", count)
        else:
            chosen = random.Random(f"{seed} {backend} {life} {kind} {share}")
            outcome = _Sweep(place, backend, life).plans(kind, part, count, chosen)
    outcome.seconds = time.monotonic() - began
    return outcome


class StageDir:
    """A directory with an image, and room for stages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self._numbers = itertools.count(1)

    def new(self) -> Path:
        path = self.directory / str(next(self._numbers))
        path.mkdir()
        return path

    def make_image(self) -> Path:
        """The image root that the worlds and the daemon expect."""
        if not self.images.exists():
            tree = self.new()
            (tree / "hello.txt").write_text("hello\n")
            self.images.mkdir()
            command = ["mksquashfs", tree, self.images / "hello.sqfs", "-quiet", "-no-progress"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(tree)
        return self.images

    @contextmanager
    def stage(self, backend: str) -> Iterator[FaultSetup]:
        if backend == "simulated":
            with simulated_stage(self.new()) as stage:
                yield stage
        else:
            places = (self.new(), _cgroup2(), self.make_image())
            with linux_stage(*places, has_pool=backend == POOLED) as stage:
                yield stage

    @contextmanager
    def program(self, backend: str) -> Iterator[DoomableProgram]:
        if backend == "simulated":
            with dropped(self.new()) as program:
                yield program
        else:
            make: Callable[[LinuxStage], Killed] = Killed
            if backend.startswith(BY_STRACE):
                make = partial(Traced, who=backend.removeprefix(BY_STRACE))
            places = (self.new(), _cgroup2(), self.make_image())
            with killed(*places, make, has_pool=backend == POOLED) as program:
                yield program


def _cgroup2() -> Path:
    found = find_cgroup2()
    assert found is not None, "cgroup v2 is not mounted"
    return found


class _Sweep:
    """One life on one backend under many plans; a stage that broke is replaced."""

    def __init__(self, place: StageDir, backend: str, life: str) -> None:
        self._place = place
        self._backend = backend
        self._name = life
        self._life = ALL_LIVES[life]
        self._points: Counter[tuple[str, str]] = Counter()
        self._missed = 0
        self._found: list[Discovery] = []

    def plans(self, kind: str, part: float, count: int, chosen: random.Random) -> Outcome:
        left: list[FaultPlan] | None = None
        calls: list[CallSite] = []
        told = 0
        while left is None or left:
            try:
                with self._place.stage(self._backend) as stage:
                    if left is None:
                        calls = stage.tell(self._life).passed
                        left = _drawn(
                            kind, (self._backend, self._name), calls, part, count, chosen
                        )[::-1]
                    while left:
                        plan = left.pop()
                        told += 1
                        self._tell(stage, plan, told)
            except Exception as error:
                if left is None:
                    raise
                self._found.append(self._discovery(plan, error))
        is_single = kind == "single"
        figures = {
            "calls of golden lives": float(len(calls)) if is_single else 0.0,
            "single faults there are": float(sum(map(len, map(faults_of, calls))))
            if is_single
            else 0.0,
            _FIGURES[kind]: float(told),
            "planned calls that were not made": float(self._missed),
        }
        return Outcome(
            figures={name: number for name, number in figures.items() if number},
            rows=self._rows() if is_single else [],
            discoveries=self._found,
        )

    def _tell(self, stage: FaultSetup, plan: FaultPlan, number: int) -> None:
        asks_afterwards = len(plan) == 1 or number % ASKED_AFTERWARDS == 0
        told = stage.tell(self._life, plan, asks_afterwards=asks_afterwards)
        if len(plan) == 1 and not told.fired:
            told = stage.tell(self._life, plan)  # a forge that was only just started makes others
        self._missed += len(plan) == 1 and not told.fired
        for fault in plan:
            self._points[fault.call.name, told.outcome] += 1

    def _rows(self) -> list[dict[str, str]]:
        names = sorted({name for name, _ in self._points})
        return [
            {
                "backend": self._backend,
                "life": self._name,
                "call": name,
                "points": str(sum(n for (of, _), n in self._points.items() if of == name)),
                "errnos": " ".join(errnos_of(name)),
                "outcomes": ", ".join(
                    f"{outcome} x {n}"
                    for (of, outcome), n in sorted(self._points.items())
                    if of == name
                ),
            }
            for name in names
        ]

    def _discovery(self, plan: FaultPlan, error: BaseException) -> Discovery:
        said = json.dumps([fault.as_json() for fault in plan])
        return Discovery(
            f"{self._name} on {self._backend}, {'; '.join(map(str, plan))}: {error}",
            f"python -m tests.campaign.faults_campaign {self._backend} {self._name!r} '{said}'",
        )


_FIGURES: Final = {
    "single": "single faults",
    "pairs": "pairs",
    "short": "short transfers",
    "kills": "kills of anchors and forges",
    "interferences": "interferences of strangers",
}


def _drawn(
    kind: str,
    of: tuple[str, str],
    calls: Sequence[CallSite],
    part: float,
    count: int,
    chosen: random.Random,
) -> list[FaultPlan]:
    if kind == "short":
        return [(fault,) for call in calls for fault in short_faults_of(call)]
    if kind == "interferences":
        faults = [fault for call in calls for fault in interferences_of(call, *of)]
    else:
        faults_in = kills_of if kind == "kills" else faults_of
        faults = [fault for call in calls for fault in faults_in(call)]
    if kind in ("single", "kills", "interferences"):
        some = faults if part >= 1 else chosen.sample(faults, max(1, round(len(faults) * part)))
        return [(fault,) for fault in some]
    faults += [fault for call in calls for fault in short_faults_of(call)]
    return [tuple(chosen.sample(faults, 2)) for _ in range(count)]


def _deaths(place: StageDir, backend: str, phase: str, scale: float, seed: int) -> Outcome:
    outcome, dead = Outcome(), 0
    step = 1 if backend == "simulated" else max(1, round(1 / scale))
    k = random.Random(f"{seed} {backend} {phase}").randint(1, step)
    while True:
        try:
            with place.program(backend) as program:
                while program.run(phase, k) is not None:
                    dead += 1
                    k += step
                break
        except Exception as error:
            outcome.discoveries.append(
                Discovery(
                    f"dying at call {k} while {phase} on {backend}: {error}",
                    f"python -m tests.campaign.faults_campaign {backend!r} {phase!r} {k}",
                )
            )
            dead += 1
            k += step
    outcome.figures["crashes below Python" if BY_STRACE in backend else "crashes"] = float(dead)
    return outcome


def _kills_at_random(place: StageDir, seed: str, count: int) -> Outcome:
    outcome = Outcome()
    try:
        with place.program("linux") as program:
            assert isinstance(program, Killed)
            killed = program.run_kills(seed, count)
        outcome.figures["kills at random"] = float(killed.total())
    except Exception as error:
        command = f"python -m tests.campaign.faults_campaign linux {seed} {count}"
        outcome.discoveries.append(Discovery(f"kills at random: {error}", command))
    return outcome


def _strace(place: StageDir, sort: str) -> Outcome:
    outcome = Outcome()
    directory = place.new()
    with warm_daemon_in(directory, place.make_image()) as daemon:
        points = [(call, errno, nth) for call, errno, _ in POINTS[sort] for nth in (1, 2, 3)]
        for number, point in enumerate(dict.fromkeys(points)):
            try:
                survive(daemon, f"nsh-test-{daemon.pid}-s{number}", point)
            except Exception as error:
                command = f"pytest tests/suites/test_strace.py -k {sort!r}  # {point}"
                outcome.discoveries.append(Discovery(f"{point} in each thread: {error}", command))
                daemon.clear()  # what is left is not found once more at each later point
            outcome.figures["strace points"] = number + 1.0
    return outcome


def _replay(backend: str, name: str, said: str) -> None:
    """What a discovery says: once more, with its traceback."""
    Session()
    with tempfile.TemporaryDirectory(prefix="nsh-test-") as directory:
        place = StageDir(Path(directory))
        if said.isdigit():
            with place.program(backend) as program:
                if name in (*PHASES, *CONSUMERS):
                    print(program.run(name, int(said)))
                else:
                    assert isinstance(program, Killed)
                    print(program.run_kills(name, int(said)))
        else:
            plan = tuple(map(Fault.of_json, json.loads(said)))
            with place.stage(backend) as stage:
                print(stage.tell(ALL_LIVES[name], plan))


if __name__ == "__main__":
    import sys

    _replay(*sys.argv[1:])
