"""`Floor`: compile floor.c and run its scenarios: what this machine cannot do faster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
PAUSE_MS: Final = 20
"""After a scenario, so that what the Linux kernel frees later is not charged to what comes next."""


class Floor:
    """
    The compiled floor.

    Args:
        folder: Where the programs are put.
        cgroup2: Where cgroup v2 is mounted; cgroups are made there, and removed.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be compiled.
    """

    def __init__(self, folder: Path, cgroup2: Path) -> None:
        self._program = folder / "floor"
        anchor, cgroup = folder / "anchor", cgroup2 / f"nsfloor-{os.getpid()}"
        compile_anchor(anchor)
        _compile(
            *("-O2", "-w", f'-DANCHOR="{anchor}"', f'-DCGROOT="{cgroup}"'),
            *("-o", self._program, HERE / "floor.c", "-lpthread"),
        )

    def run(self, scenario: str, count: int) -> dict[str, Any]:
        """
        Run one scenario.

        Returns:
            `handoff_us` and `release_us`: every time; `per_s`: whole lives a second;
            `provider_cpu_us` and `consumer_cpu_us`: processor time of a life.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        words = [self._program, "-r", "-p", str(PAUSE_MS), str(count), scenario]
        ran = subprocess.run(words, check=True, capture_output=True)
        return json.loads(ran.stdout)[scenario]  # type: ignore[no-any-return]


def compile_anchor(program: Path) -> None:
    """Compile the smallest program that stays."""
    words = ("-Os", "-static", "-nostdlib", "-fno-stack-protector")
    _compile(*words, "-o", program, HERE / "anchor.c")


def _compile(*words: str | Path) -> None:
    subprocess.run(["gcc", *words], check=True, capture_output=True)
