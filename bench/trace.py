"""How fast is `nshandoff trace check`? `python bench/trace.py`, as any user.

Writes traces of whole lives (six events each, many consumers), of two lengths, and checks each. A
ratio of the two rates near 1 means that time grows with the length alone. How much of it the kernel
itself takes is measured in the same run.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from statemachine import NamespaceRequest, NamespaceResponse, NamespaceType, ProviderKernel
from statemachine import events as on
from statemachine.events import Event
from statemachine.provider import Limits
from transport.trace import Start, Turn, encode_line
from transport.trace.check import Replay

KINDS: Final = (NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT)
LIVES_PER_CONSUMER: Final = 10
FACTOR: Final = 10
"""How much longer the second trace is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lives", type=int, default=20_000, help="lives in the longer trace")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nshandoff-bench-") as folder:
        rates = [
            measure(Path(folder) / "trace", options.lives // FACTOR),
            measure(Path(folder) / "trace", options.lives),
        ]
    print(f"rate of the longer to the shorter: {rates[1] / rates[0]:.2f}")
    return 0


def measure(path: Path, lives: int) -> float:
    with path.open("wb") as file:
        kernel = ProviderKernel()
        file.write(encode_line(0, Start(Limits())))
        for number, event in enumerate(lives_of(lives), 1):
            file.write(encode_line(number, Turn(event, kernel.receive(event))))
    replay = Replay()
    with path.open("rb") as file:
        started = time.perf_counter()
        replay.take_all(file)
        took = time.perf_counter() - started
    rate = replay.turns / took
    kernel = ProviderKernel()
    started = time.perf_counter()
    for event in lives_of(lives):
        kernel.receive(event)
    share = (time.perf_counter() - started) / took
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{replay.turns:8} events, {path.stat().st_size / 1e6:6.1f} MB: {rate:8.0f} events/s, "
        f"of which the kernel {share:.0%}; peak {peak_mib:.0f} MiB"
    )
    return rate


def lives_of(count: int) -> Iterator[Event]:
    yield on.ProviderReady()
    consumer = 0
    for number in range(count):
        if number % LIVES_PER_CONSUMER == 0:
            if consumer:
                yield on.ConnectionLost(consumer, "closed")
            consumer += 1
            yield on.ConnectionOpened(consumer, 0)
        name = f"alloc-{number}"
        made = NamespaceResponse(name, KINDS, "/run/pact/uenv/pytorch-2.5")
        yield on.RequestReceived(consumer, NamespaceRequest(name, KINDS, "pytorch-2.5.sqfs"))
        yield on.NamespacesCreated(name, made)
        yield on.ResponseSent(name, consumer)
        yield on.ScopePopulated(name)
        yield on.ScopeEmptied(name)
        yield on.NamespacesReleased(name)


if __name__ == "__main__":
    sys.exit(main())
