"""`python -m linux`: the command `nshandoff`, without an installation."""

from __future__ import annotations

import gc
import os
import sys

from . import launch


def start() -> int:
    """Run the command, in an interpreter that has none of the caller's settings."""
    if not launch.is_isolated():
        try:
            launch.isolate(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
        except OSError as error:
            text = f"no Python without the caller's settings: {error}"
            if not os.path.exists("/proc/self"):  # noqa: PTH110
                text = "there is no /proc here: mount -t proc proc /proc"
            print(f"nshandoff: {text}", file=sys.stderr)
            return 125 if sys.argv[1:2] in (["run"], ["exec"]) else 3
    launch.take_over()
    gc.disable()  # until all is imported, of which nothing is garbage
    from .cli.command import main

    return main()


if __name__ == "__main__":
    raise SystemExit(start())
