"""A provider that breaks its word fails the cases of that clause; chapter 11 knows every option.

That one can pass, from the wheel alone, is shown by `test_packaging`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from linux.testing import conformance as suite
from specs._build import clauses
from statemachine.errors import CreationFailed
from statemachine.messages import AllocationEnded
from tests.support.programs import ROOT, run_program
from transport.testing.peer import Liar, Line

PAGE = ROOT / "specs" / "11-certifying.md"


def tried(socket: Path, cases: str) -> subprocess.CompletedProcess[str]:
    """Try a simulated provider, as its makers would."""
    words = ["--pyargs", "linux.testing.conformance", f"--provider-socket={socket}", "-k", cases]
    options = ["--provider-backend=simulated", "-p", "no:cacheprovider", "-q"]
    return run_program(sys.executable, "-m", "pytest", *words, *options, cwd=ROOT)


def has_nothing_to_give(line: Line) -> None:
    """Be a provider that refuses whatever is asked, and confirms every end."""
    while (message := line.hear()) is not None:
        line.say(message if isinstance(message, AllocationEnded) else CreationFailed("no"))


def test_a_provider_that_does_not_keep_its_word_is_told_by_number(tmp_path: Path) -> None:
    socket = tmp_path / "liar.sock"
    with Liar(socket, *[has_nothing_to_give] * 20):
        run = tried(socket, "LIFE-2/1 or END-13/1")
    assert run.returncode == 1, run.stdout
    failed = re.findall(r"^FAILED .*\[(.*)\]", run.stdout, re.MULTILINE)
    assert sorted(failed) == ["END-13/1", "LIFE-2/1"]


def test_every_case_is_named_for_a_clause() -> None:
    tests = [test for name, test in vars(suite).items() if name.startswith("test_")]
    known = clauses.clauses()
    assert [n for test in tests for n in test.cases if n.partition("/")[0] not in known] == []


def test_the_page_knows_every_option(pytestconfig: pytest.Config) -> None:
    told = set(re.findall(r"^\| `(--[a-z-]+)=", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    names = [name for name in vars(pytestconfig.option) if name.startswith("provider")]
    assert told == {f"--{name.replace('_', '-')}" for name in names}
