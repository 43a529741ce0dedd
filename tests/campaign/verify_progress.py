"""How far is the campaign? A line that is redrawn on a terminal; elsewhere one for each task."""

from __future__ import annotations

import shutil
import time
from typing import Final, TextIO

from tests.campaign.outcome import Outcome
from tests.campaign.verify_pool import PoolTask

BAR_COLUMNS: Final = 24
_ERASE: Final = "\r\x1b[2K"


class Progress:
    """Tells a person how far it is, in one way on a terminal and in another elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._started = time.monotonic()
        self.done = 0
        self.total = 0
        self.found = 0

    @property
    def elapsed_s(self) -> float:
        """How long this run of the campaign has taken."""
        return time.monotonic() - self._started

    def note(self, text: str) -> None:
        """Say something that stays to be read."""
        print(f"{_ERASE if self._is_terminal else ''}{text}", file=self._out, flush=True)

    def finished(self, job: PoolTask, outcome: Outcome) -> None:
        """Say that a task is done; what it found is said with the seed that finds it again."""
        self.done += 1
        self.found += len(outcome.discoveries)
        if not self._is_terminal:
            took = f"{outcome.seconds:.1f} s"
            self.note(f"{self.done}/{self.total} {job.part}: {job.task.name} ({took})")
        for discovery in outcome.discoveries:
            self.note(f"FOUND {job.part}: {discovery.title} (seed {job.seed})")

    def draw(self, running: list[PoolTask]) -> None:
        """Redraw the line; elsewhere than on a terminal, nothing."""
        if not self._is_terminal:
            return
        share = self.done / self.total if self.total else 1.0
        full = int(share * BAR_COLUMNS)
        bar = "█" * full + "░" * (BAR_COLUMNS - full)
        now = ", ".join(f"{job.part} {job.task.name}" for job in running)
        found = f"{self.found} found" if self.found else "nothing found"
        line = f"{bar} {self.done}/{self.total}  {clock(self.elapsed_s)}  {found}  {now}"
        columns = shutil.get_terminal_size().columns
        self._out.write(_ERASE + line[: columns - 1])
        self._out.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._is_terminal:
            self._out.write(_ERASE)
            self._out.flush()


def clock(seconds: float) -> str:
    """Write a span as h:mm:ss, or as m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
