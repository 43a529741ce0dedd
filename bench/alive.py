"""What do many living allocations cost? `python bench/alive.py --count 10000`, as root.

Allocations of PID, network and mount namespace are made, one after the other, and stay. Printed are
the median creation of each tenth, the memory of each allocation, how long a provider that follows
one that was killed takes until it serves, with how many adopted, and how long the ends take.

Memory is the proportional set size (PSS) of provider, forge and anchors. What the Linux kernel
itself keeps for an allocation, of which namespaces and cgroup are the most, is in no process: it
is the difference of MemAvailable, which other programs change, too.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bench.ends import ENDS_PER_CONNECTION, end_all
from bench.fairness import WARM, creations, provider
from bench.floor import Floor
from bench.isolated import in_isolation
from bench.measures import KINDS, TENTHS
from bench.usage import cgroup_of, forge_of
from linux.features import Features
from linux.limits import DESCRIPTORS_PER_ALLOCATION, descriptors_for
from linux.namespaces import KernelInspector
from linux.survey import survey_node
from statemachine import NamespaceRequest
from statemachine.provider import Limits
from transport.request import Consumer

CONNECTIONS = 10_000 // ENDS_PER_CONNECTION + 1
"""Most at a time, of ends."""

DESCRIPTORS_OF_FLOOR: Final = 5
"""Of one allocation of `create_whole_keep`, both sides: no more are kept than fit."""

POLL_S: Final = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="allocations (default 1000)")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    found: dict[str, object] = {}

    def measure_all(folder: Path, cgroup2: Path) -> None:
        found.update(measure(folder, cgroup2, options.count))

    left = in_isolation(measure_all)
    if options.json:
        print(json.dumps({**found, "left": left}))
    else:
        for name, value in found.items():
            print(f"{name:40} {value}")
        print(f"{'left':40} {left or 'nothing'}")
    return 1 if left else 0


def measure(folder: Path, cgroup2: Path, count: int) -> dict[str, object]:
    """Make, look, kill the provider, start another, end."""
    asked, count = count, min(count, allow_descriptors(count))
    path = folder / "handoff.sock"
    options = ("--max-allocations", str(count), "--max-connections", str(CONNECTIONS))
    names, features = [f"alive-{number}" for number in range(count)], Features.probe()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    of_floor = min(count, most // DESCRIPTORS_OF_FLOOR)
    floor = _tenths(Floor(folder, cgroup2).run("create_whole_keep", of_floor)["handoff_us"])
    with provider(folder, *options) as daemon:
        creations(path, WARM)
        memory = Memory(daemon.pid, cgroup2)
        tenths = _tenths(_make(path, names))
        pss_kb, kernel_kb = memory.each_kb(count)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        (folder / "state" / "ready").unlink()  # it could not do it
        started = time.perf_counter()
        with provider(folder, *options):
            ready_s = time.perf_counter() - started
            adopted = len(survey_node(folder / "state", features).allocations)
            started = time.perf_counter()
            end_all(path, names)
            ended_s = time.perf_counter() - started
            # An end is told after a while, also of what is not released yet.
            while survey_node(folder / "state", features).allocations:
                time.sleep(POLL_S)
            released_s = time.perf_counter() - started
    missing = f"{asked} alive: the limit of descriptors is too low" if asked > count else "nothing"
    return {
        "not reached": missing,
        "alive": count,
        "creation in each tenth, us": [round(tenth) for tenth in tenths],
        "last tenth / first": round(tenths[-1] / tenths[0], 2),
        "memory each (PSS), kB": round(pss_kb, 1),
        "memory each (of the Linux kernel), kB": round(kernel_kb, 1),
        "journal, kB": sum(f.stat().st_size for f in (folder / "state").glob("journal*")) // 1024,
        "restart until it serves, s": round(ready_s, 2),
        "adopted": adopted,
        "all ended in, s": round(ended_s, 2),
        "all released in, s": round(released_s, 2),
        "creation by the C floor, each tenth, us": [round(tenth) for tenth in floor],
        "last tenth / first, of the floor": round(floor[-1] / floor[0], 2),
    }


def allow_descriptors(count: int) -> int:
    """Have descriptors for so many allocations, or as many as may be had; return for how many."""
    wanted = descriptors_for(Limits(allocations_per_uid=count, connections_per_uid=CONNECTIONS))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except ValueError:  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        count -= -(-(wanted - hard) // DESCRIPTORS_PER_ALLOCATION)
    return count


class Memory:
    """What a provider, its forge and its anchors have taken since this was made."""

    def __init__(self, provider_pid: int, cgroup2: Path) -> None:
        self._provider = provider_pid
        self._cgroup = cgroup_of(forge_of(provider_pid), cgroup2)  # anchors are in it, too
        self._before = self._now()

    def each_kb(self, count: int) -> tuple[float, float]:
        """Return the share of each of so many: of the processes, and of the Linux kernel."""
        now = self._now()
        pss, available = (b - a for a, b in zip(self._before, now, strict=True))
        return pss / count, (-available - pss) / count

    def _now(self) -> tuple[int, int]:
        members = map(int, (self._cgroup / "cgroup.procs").read_text().split())
        return _pss_kb({self._provider, *members}), _available_kb()


def _make(path: Path, names: list[str]) -> list[float]:
    """Make allocations that stay; how long each took, in microseconds."""
    consumer, times = Consumer(path, KernelInspector(Features.probe())), []
    for name in names:
        started = time.perf_counter()
        consumer.obtain(NamespaceRequest(name, KINDS)).close()
        times.append((time.perf_counter() - started) * 1e6)
    return times


def _tenths(times: list[float]) -> list[float]:
    size = len(times) // TENTHS
    return [statistics.median(times[at * size : (at + 1) * size]) for at in range(TENTHS)]


def _pss_kb(pids: Iterable[int]) -> int:
    return sum(_kb(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in pids)


def _available_kb() -> int:
    return _kb(Path("/proc/meminfo"), "MemAvailable")


def _kb(file: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.M)
    assert found is not None, "the Linux kernel says it"
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
