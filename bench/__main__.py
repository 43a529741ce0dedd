"""All figures in one command: `make bench`, or `python -m bench`, as root; about four minutes.

The provider with the blocking consumer is measured beside the C floor and beside other programs, in
rounds: each of them does a little in every round, on the same cores, so that what else the machine
does changes all. The figures are ratios, with a 95 % interval; each has a goal where one is set.

All of it happens in a cgroup and a mount table of its own, and nothing is left, also after Ctrl-C.
Exit code 1: something is left, or a figure has failed. A goal that is not reached is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import peers, results
from bench.fairness import WARM, creations, provider
from bench.floor import HERE, Floor
from bench.isolated import in_isolation
from bench.measures import KINDS, QUICK, Counts, Measured, Taken, allow_descriptors

KEPT: Final = HERE / "result.json"
"""The last result that was worth keeping; the next one is compared with it."""

CORES: Final = 2
MINUTES: Final = 4.0
SHARE_OF_ROUNDS: Final = 0.8
BUSY_LOAD: Final = 0.5
"""With more load before it begins, other work is running."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="then no new round begins")
    parser.add_argument("--rounds", type=int, default=Counts().rounds)
    parser.add_argument("--cores", type=int, default=CORES, help="all run on this many")
    parser.add_argument("--seed", type=int, default=None, help="of the intervals")
    parser.add_argument("--quick", action="store_true", help="as little as shows that it works")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="for what is written")
    parser.add_argument("--keep", action="store_true", help="compare with this result from now on")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("bench: not measured: anything; it makes real namespaces, which needs root")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    taken = Taken()
    try:
        report = run(options, taken)
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left, and nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    former = json.loads(KEPT.read_text()) if KEPT.exists() else None
    write(report, taken, options.out, options.keep)
    print(results.text_of(report, former))
    return 1 if report["failed"] or report["left"] else 0


def run(options: argparse.Namespace, taken: Taken) -> dict[str, Any]:
    """Measure everything, and say what was found and what is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, to clean up
    counts = QUICK if options.quick else Counts(rounds=options.rounds)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: options.cores])
    allow_descriptors()
    machine = {**describe_machine(), "all_cores": len(cores), "cores": cores[: options.cores]}
    machine["load_before"] = _load()
    machine["other_work"] = machine["load_before"][0] > BUSY_LOAD
    work = BenchRun(counts, options.minutes * 60, taken)
    left = in_isolation(work.run)
    results.add_derived(taken, counts.many)
    machine["load_after"] = _load()
    rows, missing = results.rows_of(taken, work.peers, seed)
    return {
        "not_measured": [*work.not_measured, *missing],
        "machine": machine,
        "settings": {**counts._asdict(), "rounds_done": work.rounds_done, "seed": seed},
        "rows": results.as_plain(rows),
        "processor_us": results.processor_of(taken),
        "alive_us": results.alive_of(taken),
        "failed": work.failed,
        "left": left,
    }


class BenchRun:
    """
    One run, in rounds.

    Args:
        counts: How many of each thing.
        seconds: After a share of them no new round begins.
        taken: Filled.
    """

    def __init__(self, counts: Counts, seconds: float, taken: Taken) -> None:
        self._counts, self._taken = counts, taken
        self._deadline = time.monotonic() + seconds * SHARE_OF_ROUNDS
        self.peers: list[str] = []
        self.not_measured: list[str] = []
        self.failed: list[str] = []
        self.rounds_done = 0

    def run(self, folder: Path, cgroup2: Path) -> None:
        """Run in a folder of its own; what fails is left out from then on, and noted."""
        floor = Floor(folder, cgroup2)
        with ExitStack() as stack:
            daemon = stack.enter_context(provider(folder))
            pooled = folder / "pooled"
            pooled.mkdir()
            kinds = ",".join(kind.value.lower() for kind in KINDS)
            stack.enter_context(provider(pooled, "--pool", f"{kinds}={self._counts.pooled}"))
            path = folder / "handoff.sock"
            creations(path, WARM)
            measured = Measured(path, daemon.pid, pooled, cgroup2, floor, self._counts, self._taken)
            self._in_rounds({**measured.in_rounds(), **self._lives_of_peers(folder)})
            for name, (repeats, work) in measured.after_rounds().items():
                for _ in range(repeats):
                    if not self._tries(name, work):
                        break

    def _in_rounds(self, works: dict[str, Callable[[], None]]) -> None:
        names = list(works)
        while self.rounds_done < self._counts.rounds and time.monotonic() < self._deadline:
            names = [name for name in names if self._tries(name, works[name])]
            # There and back, so that nothing always comes after the same.
            names.reverse()
            self.rounds_done += 1
            _say_progress(self.rounds_done, self._counts.rounds)
        if self.rounds_done < self._counts.rounds:
            self.not_measured.append(f"{self.rounds_done} of {self._counts.rounds} rounds, in time")

    def _lives_of_peers(self, folder: Path) -> dict[str, Callable[[], None]]:
        peers.make_bundle(folder)
        works: dict[str, Callable[[], None]] = {}
        for peer in peers.all_peers(folder):
            if peers.is_installed(peer):
                self.peers.append(peer.name)
                works[f"life, {peer.name}"] = partial(self._lives_of_peer, peer, folder)
            else:
                self.not_measured.append(f"{peer.name} (not installed)")
        return works

    def _lives_of_peer(self, peer: peers.OtherProgram, folder: Path) -> None:
        self._taken.add("life", peer.name, peers.lives_of(peer, folder, self._counts.peers))

    def _tries(self, name: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            self.failed.append(name)
            self.not_measured.append(f"{name}: {type(error).__name__}: {error}")
            return False
        return True


def write(report: dict[str, Any], taken: Taken, folder: Path, is_kept: bool) -> None:
    """Write the result, every value, and the pictures."""
    try:
        from bench import pictures

        pictures.draw(taken, report, folder)
    except ImportError as error:
        report["not_measured"].append(f"pictures ({error})")
    text = json.dumps(report, indent=1) + "\n"
    (folder / "result.json").write_text(text)
    results.write_csv(taken, folder / "figures.csv")
    if is_kept:
        KEPT.write_text(text)


def describe_machine() -> dict[str, Any]:
    """Say on what this was measured; without a name that tells whose it is."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "kernel": platform.release(),
        "processor": found[1] if found else platform.machine(),
        "python": platform.python_version(),
    }


def _load() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]


def _say_progress(done: int, rounds: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {rounds}", end="\n" if done == rounds else "", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
