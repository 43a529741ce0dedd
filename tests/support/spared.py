"""Whether a process was spared: alive, and not about to die of a signal that has been sent."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any


def is_spared(process: subprocess.Popen[Any]) -> bool:
    """Say whether a child lives and no SIGKILL is on its way to it; proc_pid_status(5)."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"][0] not in "ZX" and not pending >> (signal.SIGKILL - 1) & 1
