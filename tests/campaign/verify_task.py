"""One task of a campaign, in a process of its own: what `verify` starts many of.

    python -m tests.campaign.verify_task PART [--seed N] [--arguments JSON] [--outcome FILE]

By hand it repeats a task that found something: same seed, same outcome.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.campaign.outcome import Outcome
from tests.support import isolation
from tests.support.isolation import find_cgroup2

PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", metavar="PART", help="the first word of a *_campaign.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arguments", metavar="JSON", type=json.loads, default={})
    parser.add_argument("--outcome", metavar="FILE", type=Path, help="instead of standard output")
    parser.add_argument("--parent", metavar="PID", type=int, help="who must be alive")
    options = parser.parse_args()
    if options.parent is not None:
        end_with(options.parent)
    with isolated():
        outcome = perform(options.part, options.seed, options.arguments)
    said = json.dumps(outcome.as_json())
    if options.outcome is None:
        print(said)
    else:
        options.outcome.write_text(said)
    return 0


@contextmanager
def isolated() -> Iterator[None]:
    """Where that can be, see nothing of what others do with cgroups here, and leave nothing."""
    root, own = find_cgroup2(), None
    if os.geteuid() == 0 and root is not None:
        with suppress(OSError):
            own = isolation.enter(root)
    try:
        yield
    finally:
        if own is not None:
            own.leave()


def end_with(parent: int) -> None:
    """Have this process interrupted when its parent is gone, however that came about."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGINT) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise KeyboardInterrupt


def perform(part: str, seed: int, arguments: dict[str, object]) -> Outcome:
    """Run one task here."""
    module = importlib.import_module(f"tests.campaign.{part}_campaign")
    started = time.perf_counter()
    outcome: Outcome = module.run(seed, **arguments)
    outcome.seconds = time.perf_counter() - started
    return outcome


if __name__ == "__main__":
    sys.exit(main())
