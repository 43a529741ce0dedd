"""Every scenario of `specs/scenarios/` plays as it stands, and every party does what it says there.

`pytest tests/test_scenarios.py --rewrite-scenarios` writes down what the kernels do; the difference
is what there is to review. The daemon must do the same.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
import scenarios
from census import Census
from scenarios import DAEMON, KERNELS, SCENARIOS, OnDaemon, OnKernels, Scenario, Stage

from specs.clauses import clauses

NAMES = [path.stem for path in SCENARIOS]
README = (scenarios.FOLDER / "README.md").read_text(encoding="utf-8")

LINK = re.compile(r"\[([A-Z]+-\d+)\]\(([^)]+)\)")


def difference(scenario: Scenario, stage: Stage) -> str:
    """Play a scenario; say what is different from its text."""
    played = scenarios.play(scenario, stage)
    lines = difflib.unified_diff(
        scenario.text.splitlines(), played.splitlines(), "as written", "as played", lineterm=""
    )
    return "\n".join(lines)


def those_of(player: str) -> list[Path]:
    return [path for path in SCENARIOS if player in Scenario.read(path).players]


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", those_of(KERNELS), ids=stem)
def test_the_kernels_play_it_as_it_is_written(path: Path, request: pytest.FixtureRequest) -> None:
    scenario = Scenario.read(path)
    if request.config.getoption("--rewrite-scenarios"):
        path.write_text(scenarios.play(scenario, OnKernels()), encoding="utf-8")
        return
    assert difference(scenario, OnKernels()) == ""


@pytest.mark.needs_root
@pytest.mark.parametrize("path", those_of(DAEMON), ids=stem)
def test_the_daemon_plays_it_as_it_is_written(
    path: Path,
    tmp_path: Path,
    cgroup2: Path,
    image_root: Path,
    allocation_id: str,
    census: Census,
) -> None:
    stage = OnDaemon(tmp_path, cgroup2, image_root, allocation_id)
    assert difference(Scenario.read(path), stage) == ""


# --- The player can fail -----------------------------------------------------------------------

LINE = "node                 job-1: Net Mount, a cgroup with no processes"


def example() -> Scenario:
    lines = scenarios.play(_scenario("> the provider starts", "> first wants job-1: Net Mount"), OnKernels())
    return Scenario(lines)


def _scenario(*lines: str) -> Scenario:
    block = "\n".join(lines)
    return Scenario(f"# T\n\nPlayed by the kernels and the daemon.\n\n```scenario\n{block}\n```\n")
