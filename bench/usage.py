"""Processor time and wake-ups of processes: of the provider, its forge and its anchors.

Processor time of a process is that of all its threads, those that have ended as well: the clock
that the Linux kernel has for every process, of which /proc/PID/task/*/schedstat shows the threads
that are alive. Anchors that have ended are in none of them, so what the forge's cgroup has used is
read, too: in it are the forge and all anchors. What threads of the Linux kernel do afterwards (a
network namespace is freed by one) is counted nowhere.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Final

_CPUCLOCK_SCHED: Final = 2


def processor_us(pid: int) -> float:
    """Return the processor time of a process so far."""
    # As clock_getcpuclockid(3) makes it, which Python does not have.
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED) / 1e3


def own_processor_us() -> float:
    return time.process_time_ns() / 1e3


def cgroup_us(cgroup: Path) -> float:
    """Return what a cgroup has used, with all that were in it."""
    found = re.search(r"^usage_usec (\d+)$", (cgroup / "cpu.stat").read_text(), re.M)
    assert found is not None, "every cgroup v2 has this"
    return float(found[1])


def wake_ups(pid: int) -> int:
    """Count how often the threads of a process have gone to sleep: one wake-up each."""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    found = [re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", t.read_text(), re.M) for t in tasks]
    return sum(int(each[1]) for each in found if each)


def forge_of(provider: int) -> int:
    """Return the process that makes a provider's namespaces."""
    for children in Path(f"/proc/{provider}/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"linux.forge.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise LookupError(f"provider {provider} has no forge")


def cgroup_of(pid: int, cgroup2: Path) -> Path:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    path = next(line[3:] for line in lines if line.startswith("0::"))
    return cgroup2 / path.lstrip("/")
