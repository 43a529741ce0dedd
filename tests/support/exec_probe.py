"""A program that writes down all that it has from the one that executed it: `exec_probe.py FD ..`.

Run it by `env --list-signal-handling`, because a Python itself ignores two signals.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any


def raw(name: str) -> str:
    return Path(f"/proc/self/{name}").read_bytes().decode("latin-1")


def descriptors() -> dict[str, Any]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the one for the list
        flags = raw(f"fdinfo/{name}").split("flags:")[1].split()[0]
        # A pipe is another one each time.
        which = 0 if stat.S_ISFIFO(status.st_mode) else status.st_ino
        found[name] = [stat.S_IFMT(status.st_mode), status.st_dev, which, flags]
    return found


def main() -> None:
    fds = descriptors()  # before anything else is open
    status = dict(line.split(":\t", 1) for line in raw("status").splitlines() if ":\t" in line)
    fields = raw("stat").rpartition(")")[2].split()
    here, root = Path().stat(), Path("/").stat()
    timers = [signal.getitimer(which) for which in (0, 1, 2)]
    everything = {
        "descriptors": fds,
        "arguments": raw("cmdline"),
        "environment": raw("environ"),
        "blocked": status["SigBlk"],
        "pending": [status["SigPnd"], status["ShdPnd"]],
        "timers": [[bool(left), interval] for left, interval in timers],
        "directory": [str(Path.cwd()), here.st_dev, here.st_ino],
        "root": [root.st_dev, root.st_ino],
        "umask": status["Umask"],
        "limits": raw("limits"),
        "users": {name: value for name, value in status.items() if name[:3] in USERS},
        "group": fields[2:4],
        "terminal": fields[4:6],
        "priority": [fields[15:17], fields[38:40], sorted(os.sched_getaffinity(0)), io_priority()],
        "attributes": [*map(raw, ATTRIBUTES), status.get("THP_enabled")],
    }
    with os.fdopen(int(sys.argv[1]), "w") as file:
        json.dump(everything, file)


def io_priority() -> str:
    return subprocess.run(["/usr/bin/ionice"], capture_output=True, text=True, check=True).stdout


ATTRIBUTES = ("oom_score_adj", "coredump_filter", "personality", "timerslack_ns")
"""Files of a process that an exec keeps."""

USERS = ("Uid", "Gid", "Gro", "Cap", "NoN", "Sec")
"""How names in /proc/PID/status begin that are about users, groups and capabilities."""

if __name__ == "__main__":
    main()
