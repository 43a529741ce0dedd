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


def tried(*words: str) -> subprocess.CompletedProcess[str]:
    """Try a simulated provider, as its makers would."""
    options = ["--provider-backend=simulated", "-p", "no:cacheprovider", "-q", *words]
    suite = ["--pyargs", "linux.testing.conformance"]
    return run_program(sys.executable, "-m", "pytest", *suite, *options, cwd=ROOT)


def has_nothing_to_give(line: Line) -> None:
    """Be a provider that refuses whatever is asked, and confirms every end."""
    while (message := line.hear()) is not None:
        line.say(message if isinstance(message, AllocationEnded) else CreationFailed("no"))


def test_a_provider_that_does_not_keep_its_word_is_told_by_number(tmp_path: Path) -> None:
    socket = tmp_path / "liar.sock"
    with Liar(socket, *[has_nothing_to_give] * 20):
        run = tried(f"--provider-socket={socket}", "-k", "LIFE-2/1 or END-13/1")
    assert run.returncode == 1, run.stdout
    failed = re.findall(r"^FAILED .*\[(.*)\]", run.stdout, re.MULTILINE)
    assert sorted(failed) == ["END-13/1", "LIFE-2/1"]


@pytest.mark.parametrize("fault", ["No such file", "Connection refused", "path too long", None])
def test_without_a_provider_one_line_says_so(tmp_path: Path, fault: str | None) -> None:
    path = tmp_path / ("x" * 108 if fault == "path too long" else "s")
    if fault == "Connection refused":
        with Liar(path):
            pass
    run = tried(*([] if fault is None else [f"--provider-socket={path}"]))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR, run.stdout
    said = "name a provider with " if fault is None else f"no provider listens on {path}: "
    assert run.stdout.count(said) == 1
    assert (fault or said) in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert len(run.stdout.splitlines()) < 10, run.stdout


def test_every_case_is_named_for_a_clause() -> None:
    tests = [test for name, test in vars(suite).items() if name.startswith("test_")]
    known = clauses.clauses()
    assert [n for test in tests for n in test.cases if n.partition("/")[0] not in known] == []


def test_the_page_knows_every_option(pytestconfig: pytest.Config) -> None:
    told = set(re.findall(r"^\| `(--[a-z-]+)=", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    names = [name for name in vars(pytestconfig.option) if name.startswith("provider")]
    assert told == {f"--{name.replace('_', '-')}" for name in names}
