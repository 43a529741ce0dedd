"""Does a polite consumer wait for others? `python bench/fairness.py`, as root.

A polite consumer makes and ends one allocation after the other. Its creation time is taken while
nothing else happens, under each flood in turn, and, as the control, beside as many processes that
only burn the processor, in rounds. What a flood costs more than its burners is the provider's
doing.

    unknown ends        ends of ids that never were, answers read
    refused requests    requests that repeat a type, answers read
    repeated requests   the same request for a living allocation, descriptors read and closed
    creation storm      as many open requests as a connection may have, each ended when answered
    strangers           connections of a user that may not use the provider
    never reads         requests whose answers are never read, and again when it is dropped
    churn               connections that are opened and closed

Then the provider is told to stop while the flood goes on, and the time until it has is taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bench.isolated import in_isolation
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import AllocationEnded, NamespaceRequest, NamespaceType
from transport.channel import Channel, Delivery
from transport.request import Consumer
from transport.testing.peer import frame_of

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
KINDS: Final = (PID, MOUNT)
STRANGER: Final = 65_534
OTHER: Final = 54_321
START_TIMEOUT_S: Final = 60.0
"""Adopting ten thousand allocations takes some of them."""

BURST: Final = 32
ROUNDS: Final = 5
WARM: Final = 10
SETTLE_S: Final = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="creations for each figure")
    parser.add_argument("--floods", type=int, default=1, help="processes that flood at a time")
    parser.add_argument("--only", action="append", choices=FLOODS, help="only this flood")
    parser.add_argument("--other-user", action="store_true", help="floods are another user's")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    rows: list[dict[str, float | str]] = []

    def measure_all(folder: Path, _: Path) -> None:
        uid = OTHER if options.other_user else None
        for number, name in enumerate(options.only or FLOODS):
            place = folder / str(number)
            place.mkdir()
            rows.append(measure(place, name, options.count, options.floods, uid))
            if not options.json:
                print(line(rows[-1]) if number else f"{HEAD}\n{line(rows[-1])}", flush=True)

    in_isolation(measure_all)  # which ends what floods are killed with
    if options.json:
        print(json.dumps(rows))
    return 0


def measure(
    folder: Path, name: str, count: int, floods: int, uid: int | None
) -> dict[str, float | str]:
    """Time creations quiet, beside burners, and under a flood; then stop the provider."""
    folder.chmod(0o755)
    path = folder / "handoff.sock"
    user = STRANGER if name == "strangers" else uid
    flood = [lambda n=n: FLOODS[name](path, n) for n in range(floods)]
    quiet, beside, flooded = [], [], []
    with provider(folder, "--allow-uid", str(OTHER)) as daemon:
        creations(path, WARM)
        # In turns, because what else happens on the machine changes meanwhile.
        for last in (False,) * (ROUNDS - 1) + (True,):
            quiet += creations(path, count // ROUNDS)
            with processes([burn] * floods):
                beside += creations(path, count // ROUNDS)
            with processes(flood, user):
                time.sleep(SETTLE_S)
                flooded += creations(path, count // ROUNDS)
                if last:
                    started = time.perf_counter()
                    daemon.terminate()
                    daemon.wait()
                    stop_s = time.perf_counter() - started
    taken = {"quiet": quiet, "burners": beside, "flood": flooded}
    return {
        "flood": name,
        **{f"{word}_p50_ms": statistics.median(times) for word, times in taken.items()},
        **{f"{word}_p99_ms": p99(times) for word, times in taken.items()},
        "stop_s": stop_s,
    }


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def creations(path: Path, count: int) -> list[float]:
    """Make and end allocations, one after the other, each on a connection of its own; in ms."""
    consumer = Consumer(path, KernelInspector(Features.probe()))
    times = []
    for number in range(count):
        request = NamespaceRequest(f"polite-{os.getpid()}-{next(_numbers)}-{number}", KINDS)
        started = time.perf_counter()
        handoff = consumer.obtain(request)
        times.append((time.perf_counter() - started) * 1e3)
        handoff.end()
        handoff.close()
    return times


_numbers = itertools.count()


@contextmanager
def provider(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a provider of its own, with further options."""
    path, state = folder / "handoff.sock", folder / "state"
    log = (folder / "log").open("wb")
    daemon = subprocess.Popen(
        [
            *(sys.executable, *os.environ.get("BENCH_PYTHON", "").split(), "-m", "linux", "serve"),
            *("--socket", path, "--state-dir", state, "--mode", "0666"),
            *("--image-root", folder, "--uenv-base", folder / "uenv"),
            *options,
        ],
        stderr=log,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (state / "ready").exists():
            if time.monotonic() > deadline or daemon.poll() is not None:
                raise TimeoutError("the provider did not become ready")
            time.sleep(0.01)
        yield daemon
    finally:
        daemon.terminate()
        daemon.wait()


@contextmanager
def processes(works: list[Callable[[], None]], uid: int | None = None) -> Iterator[None]:
    """Have a process do each piece of work over and over, until the context is left."""
    pids = [start(work, uid) for work in works]
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def start(work: Callable[[], None], uid: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        if uid is not None:
            os.setresuid(uid, uid, uid)
        while True:
            with suppress(OSError):
                work()
    finally:
        os._exit(1)


# --- What the processes do -----------------------------------------------------------------------


def burn() -> None:
    while True:
        pass


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def ask(path: Path, frames: bytes, answers: int) -> None:
    """Say the same over and over on one connection, and read what is answered."""
    with connect(path) as sock:
        while True:
            sock.sendall(frames)
            left = answers
            while left:
                left -= len(read_frames(sock, left))


def read_frames(sock: socket.socket, most: int) -> list[bytes]:
    """Read at least one frame; descriptors are closed."""
    bodies: list[bytes] = []
    while not bodies or (len(bodies) < most and _ready(sock)):
        data, fds, _, _ = socket.recv_fds(sock, 4, 8)
        for fd in fds:
            os.close(fd)
        if not data:
            raise ConnectionResetError
        body = b""
        size = int.from_bytes(data, "big")
        while len(body) < size:
            body += sock.recv(size - len(body))
        bodies.append(body)
    return bodies


def _ready(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def unknown_ends(path: Path, number: int) -> None:
    ask(path, frame_of(AllocationEnded(f"never-{number}")) * BURST, BURST)


def refused_requests(path: Path, number: int) -> None:
    ask(path, frame_of(NamespaceRequest(f"bad-{number}", (PID, PID))) * BURST, BURST)


def repeated_requests(path: Path, number: int) -> None:
    ask(path, frame_of(NamespaceRequest(f"again-{number}", KINDS)) * BURST, BURST)


def creation_storm(path: Path, number: int) -> None:
    with connect(path) as sock:
        channel = Channel(sock, accepts_descriptors=True)
        names = (f"storm-{number}-{n}" for n in itertools.count())
        open_ = 0
        sock.setblocking(True)
        while True:
            while open_ < 60:
                sock.sendall(frame_of(NamespaceRequest(next(names), KINDS)))
                open_ += 1
            _wait(sock)
            sock.setblocking(False)
            for received in channel.receive():
                if not isinstance(received, Delivery):
                    raise ConnectionResetError
                received.bundle.close()
                if isinstance(received.message, AllocationEnded):
                    open_ -= 1
                elif hasattr(received.message, "fd_types"):
                    sock.setblocking(True)
                    sock.sendall(frame_of(AllocationEnded(received.message.allocation_id)))
                else:
                    open_ -= 1
            sock.setblocking(True)


def _wait(sock: socket.socket) -> None:
    sock.recv(1, socket.MSG_PEEK)


def strangers(path: Path, number: int) -> None:
    with connect(path) as sock:
        while sock.recv(4096):
            pass


def never_reads(path: Path, number: int) -> None:
    with connect(path) as sock:
        while True:
            sock.sendall(frame_of(NamespaceRequest(f"unread-{number}", KINDS)) * BURST)


def churn(path: Path, number: int) -> None:
    connect(path).close()


FLOODS: Final[dict[str, Callable[[Path, int], None]]] = {
    "unknown ends": unknown_ends,
    "refused requests": refused_requests,
    "repeated requests": repeated_requests,
    "creation storm": creation_storm,
    "strangers": strangers,
    "never reads": never_reads,
    "churn": churn,
}

HEAD: Final = (
    f"{'':18}{'p50 quiet':>11}{'burners':>9}{'flood':>9}{'p99 quiet':>11}{'burners':>9}"
    f"{'flood':>9}{'x quiet':>9}{'x burners':>10}{'stop s':>8}"
)


def line(row: dict[str, float | str]) -> str:
    quiet, burners, flood = (float(row[f"{word}_p99_ms"]) for word in ("quiet", "burners", "flood"))
    p50s = [float(row[f"{word}_p50_ms"]) for word in ("quiet", "burners", "flood")]
    return (
        f"{row['flood']:18}{p50s[0]:11.1f}{p50s[1]:9.1f}{p50s[2]:9.1f}"
        f"{quiet:11.1f}{burners:9.1f}{flood:9.1f}{flood / quiet:9.1f}{flood / burners:10.1f}"
        f"{float(row['stop_s']):8.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
