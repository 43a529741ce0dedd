"""Where does the time of a hand-over go, step by step? `python bench/budget.py`, as root.

A consumer makes and ends allocations, one after the other, with a provider whose steps are timed:
those of its event loop, of the threads that make and release, and of its forge. A step's time is
its own, without the steps that it has in it. The table has the median microseconds of a life, how
often a life has the step, and what share of all steps that is; waiting is no step.

Timing a step costs about a microsecond, in which steps that are short look longer than they are.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import NamespaceRequest, NamespaceType
from transport.request import Consumer

LIVES: Final = 300
BUDGET_US: Final = 20.0
"""A step that takes longer is argued in the README beside this, or goes."""


class TimedStep(NamedTuple):
    """A function or method that is a step."""

    name: str
    owner: str
    """The module, or the class in it: `linux.backend:LinuxBackend`."""
    function: str


PROVIDER: Final = (
    TimedStep("accept a connection", "transport.endpoint:Listener", "accept_if"),
    TimedStep("know a connection", "transport.serve.peers:Connections", "_take_up"),
    TimedStep("read a frame, and take turns", "transport.serve.peers:Connections", "_read_ready"),
    TimedStep("decide", "statemachine.provider.kernel:ProviderKernel", "receive"),
    TimedStep("log", "linux.cli.event_log:EventLog", "__call__"),
    TimedStep("queue work for a thread", "transport.serve.work:BackendWork", "_add"),
    TimedStep("take the outcome of work", "transport.serve.work:BackendWork", "_done"),
    TimedStep("watch the scope", "transport.serve.watch:Watcher", "watch"),
    TimedStep("look what happened to scopes", "transport.serve.watch:Watcher", "observe"),
    TimedStep("open the descriptors", "linux.backend:LinuxBackend", "bundle_of"),
    TimedStep("send a message", "transport.channel:Channel", "send"),
    TimedStep("send a response", "transport.channel:Channel", "offer"),
    TimedStep("note the hand-over", "linux.backend:LinuxBackend", "_mark_handed"),
    TimedStep("note the end", "linux.backend:LinuxBackend", "_mark_end"),
    TimedStep("drop a connection", "transport.serve.peers:ServedConnection", "drop"),
    TimedStep("journal the intent", "linux.backend:LinuxBackend", "_intend"),
    TimedStep("make the scope", "linux.backend:LinuxBackend", "_make_scope"),
    TimedStep("ask the forge, and wait", "linux.forge.client:Forge", "make"),
    TimedStep("journal what was made", "linux.backend:LinuxBackend", "_publish"),
    TimedStep("end the init, and wait", "linux.backend:LinuxBackend", "_end_init"),
    TimedStep("remove the scope", "linux.backend:LinuxBackend", "_remove_scope"),
    TimedStep("journal the release", "linux.backend:LinuxBackend", "_forget"),
)
CONSUMER: Final = (
    TimedStep("consumer: connect", "transport.request.exchange:Exchange", "try_to_connect"),
    TimedStep("consumer: decide, and send", "transport.request.exchange:Exchange", "feed"),
    TimedStep("consumer: read", "transport.request.exchange:Exchange", "read"),
    TimedStep("consumer: verify the descriptors", "transport.request.exchange", "verify_bundle"),
)
FORGE: Final = (
    TimedStep("forge: all but the following", "linux.forge.child:ForgeProgram", "_answer"),
    TimedStep("forge: unshare(2)", "linux.forge.child", "_unshare"),
    TimedStep("forge: propagation", "linux.forge.child", "_separate_mounts"),
    TimedStep("forge: lo", "linux.forge.child", "_bring_up_lo"),
    TimedStep("forge: /sys", "linux.forge.child", "_mount_sys"),
    TimedStep("forge: start the anchor", "linux.forge.child", "_start_anchor"),
    TimedStep("forge: /proc", "linux.forge.child", "_mount_proc"),
    TimedStep("forge: return to its own namespaces", "linux.forge.child:ForgeProgram", "_return"),
)


class StepTimes:
    """Times steps: each without those within it, in its thread."""

    def __init__(self) -> None:
        self.taken: Final[dict[str, list[float]]] = defaultdict(list)
        self._open: Final = threading.local()

    def time(self, step: TimedStep) -> None:
        """Time a step from now on, wherever it is called from."""
        module, _, cls = step.owner.partition(":")
        owner: Any = __import__(module, fromlist=["_"])
        if cls:
            owner = getattr(owner, cls)
        function = getattr(owner, step.function)
        timed = self._timed(step.name, function)
        setattr(owner, step.function, timed)
        _replace_in_tables(sys.modules[module], function, timed)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        taken = self.taken[name]

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            within = getattr(self._open, "within", None)
            if within is None:
                within = self._open.within = []
            within.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                passed = time.perf_counter() - started
                taken.append((passed - within.pop()) * 1e6)
                if within:
                    within[-1] += passed

        return timed


def _replace_in_tables(module: Any, function: Any, timed: Any) -> None:
    """Also where a table of the module names the function: a step of a creation, for example."""
    for name, table in list(vars(module).items()):
        if isinstance(table, Mapping):
            changed = {key: timed if value is function else value for key, value in table.items()}
            setattr(module, name, changed)
        elif isinstance(table, tuple) and table and all(isinstance(row, tuple) for row in table):
            setattr(module, name, tuple(_changed(row, function, timed) for row in table))


def _changed(row: Any, function: Any, timed: Any) -> Any:
    values = [timed if value is function else value for value in row]
    return type(row)(*values) if hasattr(row, "_fields") else tuple(values)


def run_timed(steps: tuple[TimedStep, ...], path: Path, main: Callable[[], object]) -> None:
    """Be a program whose steps are timed."""
    watch = StepTimes()
    for step in steps:
        watch.time(step)
    try:
        main()
    finally:
        path.write_text(json.dumps(watch.taken))


def be_provider(place: str, words: list[str]) -> None:
    """Be a provider whose steps are timed, and whose forge is such a one as well."""
    import linux.backend
    from linux.cli.command import main

    command = (sys.executable, "-P", "-m", "bench.budget", "forge", place)
    linux.backend.Forge = functools.partial(linux.backend.Forge, command=command)  # type: ignore
    sys.argv = ["nshandoff", *words]
    run_timed(PROVIDER, Path(place) / f"provider-{os.getpid()}.json", main)


def be_forge(place: str, number: str) -> None:
    """Be a forge whose steps are timed."""
    from linux.forge.child import main

    sys.argv = ["forge", number]
    run_timed(FORGE, Path(place) / f"forge-{os.getpid()}.json", main)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lives", type=int, default=LIVES)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nshandoff-bench-") as folder:
        rows = measure(Path(folder), options.lives)
    print(json.dumps([row._asdict() for row in rows]) if options.json else text_of(rows))
    return 0


class StepCost(NamedTuple):
    """What one step takes."""

    step: str
    median_us: float
    times: float
    """A life has it."""
    life_us: float
    """Of a life, on average."""


def measure(place: Path, lives: int) -> list[StepCost]:
    """Lead lives with a provider whose steps are timed."""
    watch = StepTimes()
    for step in CONSUMER:
        watch.time(step)
    socket, state = place / "handoff.sock", place / "state"
    words = ["serve", "--socket", socket, "--state-dir", state, "--image-root", place]
    command = [sys.executable, "-P", "-m", "bench.budget", "provider", place, *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as program:
        try:
            while not (state / "ready").exists():
                if program.poll() is not None:
                    raise RuntimeError("the provider did not become ready")
                time.sleep(0.01)
            lead(socket, lives)
        finally:
            program.terminate()
    taken = dict(watch.taken)
    for path in place.glob("*-*.json"):
        taken |= json.loads(path.read_text())
    rows = [
        StepCost(name, statistics.median(times), len(times) / lives, sum(times) / lives)
        for name, times in taken.items()
        if times
    ]
    return sorted(rows, key=lambda row: -row.life_us)


def lead(socket: Path, lives: int) -> None:
    """Make and end allocations, one after the other."""
    consumer = Consumer(socket, KernelInspector(Features.probe()))
    for number in range(lives):
        request = NamespaceRequest(f"budget-{os.getpid()}-{number}", tuple(NamespaceType))
        with consumer.obtain(request) as handoff:
            handoff.end()


def text_of(rows: list[StepCost]) -> str:
    lines = [f"{'step':40}{'median us':>10}{'a life':>8}{'us a life':>11}"]
    for row in rows:
        is_over = " *" if row.median_us > BUDGET_US else ""
        figures = f"{row.median_us:10.0f}{row.times:8.1f}{row.life_us:11.0f}"
        lines.append(f"{row.step:40}{figures}{is_over}")
    return "\n".join([*lines, f"* more than {BUDGET_US:.0f} us: argued in README.md"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["provider", place, *words]:
            be_provider(place, words)
        case ["forge", place, number]:
            be_forge(place, number)
        case _:
            sys.exit(main())
