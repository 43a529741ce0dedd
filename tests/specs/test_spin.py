"""The Promela program beside the kernel: the same states; and each property holds, and can fail.

What is checked, and within which bounds, is read from chapter 13.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from statemachine.provider import Limits
from statemachine.testing.open_environment import OpenEnvironment, search, search_all

ROOT: Final = Path(__file__).parents[2]
PROGRAM: Final = ROOT / "specs" / "spin" / "handoff.pml"
CHAPTER: Final = (ROOT / "specs" / "13-model.md").read_text(encoding="utf-8")
LIMITS: Final = Limits(allowed_uids=frozenset({0, 1}), open_per_connection=1, allocations_per_uid=1)
SECONDS_MAX: Final = 280

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="spin is missing")


@dataclass(frozen=True)
class SpinSpace:
    """Bounds as the chapter writes them: `2 x 1, 2, CRASH`."""

    text: str
    states: int = 0

    @property
    def environment(self) -> OpenEnvironment:
        allocations, connections, messages = map(int, re.findall(r"\d+", self.text)[:3])
        return OpenEnvironment(
            allocations,
            connections,
            messages,
            "READINESS" in self.text,
            "CRASH" in self.text,
            LIMITS if "LIMITS" in self.text else None,
        )

    @property
    def options(self) -> list[str]:
        bounds = self.environment
        return [
            f"-DALLOCATIONS={bounds.allocations}",
            f"-DCONNECTIONS={bounds.connections}",
            f"-DMESSAGES={bounds.messages}",
            *(f"-D{variant}" for variant in re.findall(r"[A-Z]+", self.text)),
        ]


def rows(pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, CHAPTER, re.MULTILINE)


SPACES: Final = [
    SpinSpace(text, int(states.replace(",", "")))
    for text, states in rows(r"`(\d x \d, \d[A-Z, ]*)`: ([\d,]+)[;.]")
]
LARGE: Final = 5_000
LARGEST: Final = 50_000
"""From how many states on a space is left to the campaign, and to one at scale 1."""
_LARGE: Final = pytest.mark.deep("long")
_LARGEST: Final = pytest.mark.deep("large")
PROPERTIES: Final = rows(r"^\| `(\w+)` \| .* \| (\d x \d, \d[A-Z, ]*) \| .* \|$")
ASSERTIONS: Final = [row for row in PROPERTIES if not re.match(r"L\d|END", row[0])]
FORMULAS: Final = [row for row in PROPERTIES if re.match(r"L\d|END", row[0])]


def checker(folder: Path, options: list[str], *definitions: str) -> Path:
    """Compile the program to one that searches all its states."""
    for command in (
        ["spin", "-o1", "-o2", "-a", *options, str(PROGRAM)],
        ["cc", "-O0", "-w", "-DNOREDUCE", "-DNFAIR=4", *definitions, "-o", "pan", "pan.c"],
    ):
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder / "pan"


def run(program: Path, *options: str) -> str:
    """Let it search; it says what it has found."""
    command = [str(program), "-m1000000", "-w20", *options]
    said = subprocess.run(
        command, cwd=program.parent, capture_output=True, timeout=SECONDS_MAX, check=False
    )
    assert b"Search not completed" in said.stdout or b"errors: 0" in said.stdout, said
    assert b"max search depth too small" not in said.stdout
    return said.stdout.decode()


def check_same_states(folder: Path, space: SpinSpace) -> None:
    said = run(checker(folder, [*space.options, "-DDUMP"], "-DSAFETY", "-DPRINTF"))
    assert "errors: 0" in said
    [stored] = re.findall(r"(\d+) states, stored", said)
    lines = {line.strip() for line in re.findall(r"STATE (.*)", said)}
    found = {line.strip() for line in search(space.environment).nodes}
    assert sorted(lines - found)[:3] == sorted(found - lines)[:3] == []
    assert len(found) == int(stored) == space.states


@pytest.mark.parametrize(
    "space", [space for space in SPACES if space.states < LARGE], ids=lambda space: space.text
)
def test_basic_kernel_and_program_reach_the_same_states(space: SpinSpace, tmp_path: Path) -> None:
    check_same_states(tmp_path, space)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "space",
    [
        pytest.param(s, marks=_LARGEST if s.states >= LARGEST else _LARGE)
        for s in SPACES
        if s.states >= LARGE
    ],
    ids=lambda space: space.text,
)
def test_kernel_and_program_reach_the_same_states_of_large_spaces(
    space: SpinSpace, tmp_path: Path
) -> None:
    check_same_states(tmp_path, space)


@pytest.mark.parametrize("text", ["1 x 1, 2", "1 x 1, 1, READINESS CRASH", "1 x 1, 2, LIMITS"])
def test_states_of_one_line_are_followed_by_the_same_lines(text: str) -> None:
    """So it is enough that `search` follows one of them."""
    environment = SpinSpace(text).environment
    everything, found = search_all(environment), search(environment)
    assert set(everything.nodes) == set(found.nodes)
    assert everything.states > found.states


@pytest.mark.parametrize(("name", "text"), ASSERTIONS, ids=lambda value: value.split(" ")[0])
def test_a_broken_rule_violates_the_assertion(name: str, text: str, tmp_path: Path) -> None:
    options = [*SpinSpace(text).options, "-DGHOST"] if "CRASH" in text else SpinSpace(text).options
    said = run(checker(tmp_path, [*options, f"-DBREAK_{name}"], "-DSAFETY"))
    assert re.search(rf"assertion violated [ (]*(\w+\|\|)*{name}\b", said), said


@pytest.mark.parametrize("text", sorted({text for _, text in FORMULAS}))
def test_every_formula_holds_and_is_violated_where_its_rule_is_broken(
    text: str, tmp_path: Path
) -> None:
    """Under weak fairness, in one compiled program for all that hold."""
    names = [name for name, bounds in FORMULAS if bounds == text]
    options = [*SpinSpace(text).options, "-DLIVENESS"]
    program = checker(tmp_path, options)
    for name in names:
        assert "errors: 0" in run(program, "-a", "-f", "-N", name), name
        broken = tmp_path / name
        broken.mkdir()
        program_broken = checker(broken, [*options, f"-DBREAK_{name}"])
        assert "acceptance cycle" in run(program_broken, "-a", "-f", "-N", name), name


def test_every_deliberate_error_of_the_program_is_in_the_table() -> None:
    program = PROGRAM.read_text(encoding="utf-8")
    assert set(re.findall(r"BREAK_(\w+)", program)) - {"X"} == {name for name, _ in PROPERTIES}
    assert set(re.findall(r"^ltl (\w+)", program, re.MULTILINE)) == {name for name, _ in FORMULAS}
