"""Does a creation wait for many ends? `python bench/ends.py`, as root.

Many allocations are made and then ended at once, over several connections, as when a large job
ends. Meanwhile a polite consumer makes and ends one allocation after the other, until the last of
the many has ended. Its median and its worst creation time are printed, beside those of as many
creations while nothing else happens and while one process burns the processor, in rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Final

from bench.fairness import WARM, burn, connect, creations, processes, provider, read_frames
from bench.isolated import in_isolation
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import AllocationEnded, NamespaceRequest, NamespaceType
from transport.request import Consumer
from transport.testing.peer import frame_of

ENDS_PER_CONNECTION: Final = 100
KINDS: Final = tuple(NamespaceType)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="allocations that end at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", type=int, default=0, help="anchors that are made ahead")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    rows: list[dict[str, float]] = []

    def measure_all(folder: Path, _: Path) -> None:
        path = folder / "handoff.sock"
        pool = ("--pool", f"pid,mount={options.pool}") if options.pool else ()
        with provider(folder, *pool):
            creations(path, WARM)
            rows.extend(measure(path, options.count) for _ in range(options.rounds))

    in_isolation(measure_all)
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{'creation, ms':14}{'p50 quiet':>10}{'burner':>8}{'ends':>8}", end="")
    print(f"{'worst quiet':>13}{'burner':>8}{'ends':>8}{'created':>9}{'ended in s':>12}")
    for number, row in enumerate(rows, 1):
        times = [row[f"{what}_{word}_ms"] for what in ("p50", "worst") for word in WORDS]
        print(f"{f'round {number}':14}{times[0]:10.1f}{times[1]:8.1f}{times[2]:8.1f}", end="")
        print(f"{times[3]:13.1f}{times[4]:8.1f}{times[5]:8.1f}", end="")
        print(f"{row['created']:9}{row['ended_s']:12.2f}")
    return 0


WORDS: Final = ("quiet", "burner", "ends")


def measure(path: Path, count: int) -> dict[str, float]:
    names = make(path, count)
    ending = threading.Thread(target=end_all, args=(path, names))
    started = time.perf_counter()
    ending.start()
    times = []
    while ending.is_alive():
        times += creations(path, 1)
    ended_s = time.perf_counter() - started
    quiet = creations(path, len(times))
    with processes([burn]):
        burner = creations(path, len(times))
    taken = dict(zip(WORDS, (quiet, burner, times), strict=True))
    return {
        **{f"p50_{word}_ms": statistics.median(values) for word, values in taken.items()},
        **{f"worst_{word}_ms": max(values) for word, values in taken.items()},
        "created": len(times),
        "ended_s": ended_s,
    }


def make(path: Path, count: int) -> list[str]:
    """Make allocations that stay."""
    consumer = Consumer(path, KernelInspector(Features.probe()))
    names = [f"many-{os.getpid()}-{time.monotonic_ns()}-{number}" for number in range(count)]
    for name in names:
        consumer.obtain(NamespaceRequest(name, KINDS)).close()
    return names


def end_all(path: Path, names: list[str]) -> None:
    """End them at once, and wait until all have ended."""
    parts = [
        names[at : at + ENDS_PER_CONNECTION] for at in range(0, len(names), ENDS_PER_CONNECTION)
    ]
    lines = [(connect(path), part) for part in parts]
    for sock, part in lines:
        sock.sendall(b"".join(frame_of(AllocationEnded(name)) for name in part))
    for sock, part in lines:
        left = len(part)
        while left:
            left -= len(read_frames(sock, left))
        sock.close()


if __name__ == "__main__":
    sys.exit(main())
