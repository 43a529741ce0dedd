"""The tests that take longer than `make test` may, as a part of a campaign: a task for each file.

They say so by the mark `deep("long")`, or `sample(n)` if that is so of all but one case in n. They
are the same at any scale.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.campaign.outcome import Discovery, Outcome, Task

ROOT: Final = Path(__file__).parents[2]


def tasks(scale: float) -> list[Task]:
    """List the files that have such tests."""
    return tasks_of("long", "sample(")


def tasks_of(part: str, *more_marks: str) -> list[Task]:
    """List the files that have tests of a part."""
    marks = [f"pytest.mark.{mark}" for mark in (f'deep("{part}")', *more_marks)]
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [path for path, text in texts.items() if any(mark in text for mark in marks)]
    return [Task(p.stem, {"file": str(p.relative_to(ROOT)), "part": part}) for p in found]


def run(seed: int, file: str, part: str) -> Outcome:
    """Run those of a file."""
    seeded = f"--randomly-seed={seed % 2**32}"
    words = ["pytest", "-q", "--deep", part, "-p", "no:cacheprovider", seeded, file]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    outcome = Outcome(figures={"files": 1.0}, seconds=time.monotonic() - begin)
    if done.returncode:
        outcome.discoveries.append(
            Discovery(f"{file}: {_closing(done.stdout)}", f"{shlex.join(words)}\n\n{done.stdout}")
        )
    return outcome


def _closing(output: str) -> str:
    return (output.strip().splitlines() or ["it printed nothing"])[-1]
