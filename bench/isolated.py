"""Work in a cgroup, a mount table and a folder of its own, so that nothing is left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support import isolation
from tests.support.census import Session

LEFT_S: Final = 10.0
"""What is there for longer, after the end, is left."""


def in_isolation(work: Callable[[Path, Path], None]) -> list[str]:
    """
    Do some work, given its folder and where cgroup v2 is; remove what it leaves.

    Other users may look into the folder.

    Returns:
        What was left, and removed.
    """
    session = Session()
    assert session.cgroup2 is not None, "there is no cgroup v2 here"
    isolated = isolation.enter(session.cgroup2)
    try:
        with tempfile.TemporaryDirectory(prefix="nshandoff-bench-") as folder:
            session.directories, session.patience_s = (f"{folder}/",), LEFT_S
            Path(folder).chmod(0o755)
            before = session.census()
            work(Path(folder), session.cgroup2)
            return session.clean(session.left_since(before))
    finally:
        isolated.leave()
