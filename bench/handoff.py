"""How close is the provider to what the machine can do? `python bench/handoff.py`, as root.

Every figure is a ratio against the C floor (`floor.c`: the same kernel work with nothing around it)
measured in the same run on the same machine, so that a slow machine changes both. What is compared:

    ask again   the same request for a living allocation: three descriptors, checked and closed
                against `socket`: the same exchange in C, descriptors made beforehand
    create      request to verified descriptors in hand, a new allocation each time
                against `create_dress`: three namespaces, /proc, lo and propagation set up in C
    release     `AllocationEnded` to its confirmation, everything gone
                against the release of `create_dress`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import NamespaceRequest, NamespaceType
from transport.request import Consumer, Handoff

HERE: Final = Path(__file__).resolve().parent
START_TIMEOUT_S: Final = 10.0
KINDS: Final = (NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="exchanges for each figure")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nshandoff-bench-") as folder:
        floor = measure_floor(Path(folder), options.count)
        with provider(Path(folder)) as consumer:
            ours = measure_ours(consumer, options.count)
    rows = compare(ours, floor)
    print(json.dumps(rows) if options.json else table(rows))
    return 0


def measure_floor(folder: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Compile the floor and run the scenarios that we have a counterpart of."""
    program = folder / "floor"
    subprocess.run(["gcc", "-O2", "-w", "-o", program, HERE / "floor.c", "-lpthread"], check=True)
    scenarios = ["socket", "create_dress"]
    ran = subprocess.run(
        [program, str(count), *scenarios], check=True, capture_output=True, cwd=folder
    )
    return json.loads(ran.stdout)


@contextmanager
def provider(folder: Path) -> Iterator[Consumer]:
    """Run a provider of its own, and a consumer that asks it."""
    path, state = folder / "handoff.sock", folder / "state"
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-m", "linux", "serve"),
            *("--socket", path, "--state-dir", state),
            *("--image-root", folder, "--uenv-base", folder / "uenv"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (state / "ready").exists())
        yield Consumer(path, KernelInspector(Features.probe()))
    finally:
        daemon.terminate()
        daemon.wait()


def measure_ours(consumer: Consumer, count: int) -> dict[str, list[float]]:
    """Time each exchange, in microseconds."""
    create, release, again = [], [], []
    for number in range(count):
        started = time.perf_counter()
        handoff = obtain(consumer, f"bench-{os.getpid()}-{number}")
        created = time.perf_counter()
        handoff.end()
        release.append(microseconds(created))
        create.append((created - started) * 1e6)
        handoff.close()
    with obtain(consumer, f"bench-{os.getpid()}-again") as held:
        for _ in range(count):
            started = time.perf_counter()
            obtain(consumer, held.request.allocation_id).close()
            again.append(microseconds(started))
        held.end()
    return {"ask again": again, "create": create, "release": release}


def obtain(consumer: Consumer, allocation_id: str) -> Handoff:
    return consumer.obtain(NamespaceRequest(allocation_id, KINDS))


def microseconds(since: float) -> float:
    return (time.perf_counter() - since) * 1e6


def compare(
    ours: dict[str, list[float]], floor: dict[str, dict[str, dict[str, float]]]
) -> dict[str, dict[str, float]]:
    against = {
        "ask again": floor["socket"]["handoff"],
        "create": floor["create_dress"]["handoff"],
        "release": floor["create_dress"]["release"],
    }
    rows = {}
    for name, values in ours.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        rows[name] = {
            "ours_p50_us": round(p50, 1),
            "ours_p99_us": round(p99, 1),
            "floor_p50_us": against[name]["p50"],
            "floor_p99_us": against[name]["p99"],
            "ratio_p50": round(p50 / against[name]["p50"], 2),
        }
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = ["ours_p50_us", "ours_p99_us", "floor_p50_us", "floor_p99_us", "ratio_p50"]
    lines = ["".join([f"{'':10}", *(f"{column:>14}" for column in columns)])]
    for name, row in rows.items():
        lines.append("".join([f"{name:10}", *(f"{row[column]:14.1f}" for column in columns)]))
    return "\n".join(lines)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the provider did not become ready")
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
