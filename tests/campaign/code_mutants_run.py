"""Tries mutants of a module with pytest: each in a fork of one session, with its code in place.

The tests are collected once. A first fork runs all of them, and notes how long each took and which
lines of the module it ran. Then each mutant has a fork of its own, which puts the mutant's code
into the functions that are there and runs the tests of its line, the quickest first. The file reads
as the mutant does meanwhile, for programs that a test starts.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Final

import pytest

TESTS_S: Final = 60.0
"""How much of the processor's time the tests of a module may take to be known, once."""
MUTANT_S: Final = 10.0
"""How long the tests take together that a mutant is tried with."""
TIMES_MAX: Final = 4.0
"""A mutant with which they take so many times as long, and a moment, hangs."""
MOMENT_S: Final = 8.0

KILLED: Final = 1
"""Exit code of a fork in which a test failed."""
UNTRIED: Final = 3
"""Exit code of a fork that could not be changed: it runs on import, or has other variables."""


def prepare(plan: str) -> Callable[[], None]:
    """Return what tries the mutants of a plan, and writes what came of them in its place."""
    os.environ["CI"] = "true"
    os.environ["NSHANDOFF_DEADLINE_S"] = "6"
    path = Path(plan)
    return lambda: _run(path, json.loads(path.read_text(encoding="utf-8")))


def _run(path: Path, plan: dict[str, Any]) -> None:
    trial = _Trial(plan["module"], plan["mutants"])
    options = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    options += ["-m", "not deep", f"--basetemp={Path.cwd() / 'basetemp'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-o", "addopts=--strict-markers"]
    pytest.main([*options, *plan["tests"]], plugins=[trial])
    if trial.result:
        path.write_text(json.dumps(trial.result), encoding="utf-8")


class _Trial:
    """A plugin that has mutants tried in place of the tests."""

    def __init__(self, module: str, mutants: list[tuple[int, str, str]]) -> None:
        self._file: Final = Path.cwd() / module
        self._name: Final = module.removesuffix(".py").replace("/", ".")
        self._mutants: Final = mutants
        self.result: dict[str, Any] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        began, original = time.monotonic(), self._file.read_text(encoding="utf-8")
        items = {item.nodeid: item for item in session.items}
        known = self._know(items)
        functions = self._functions()
        killed, untried, survivors = 0, 0, []
        for line, source, said in self._mutants:
            chosen, seconds = _chosen(known, line)
            self._file.write_text(source, encoding="utf-8")
            tests = [items[name] for name in chosen]
            work = partial(self._try, tests, functions, original, source)
            code = _in_fork(work, MOMENT_S + TIMES_MAX * seconds)
            killed += code not in (0, UNTRIED)
            untried += code == UNTRIED
            if code == 0:
                survivors.append(said if chosen else f"{said} (no test runs it)")
        self._file.write_text(original, encoding="utf-8")
        self.result = {
            "killed": killed,
            "untried": untried,
            "survivors": survivors,
            "tests": sum(1 for each in known.values() if each[1]),
            "seconds": round(time.monotonic() - began, 1),
        }
        return True

    def _know(self, items: dict[str, pytest.Item]) -> dict[str, tuple[float, list[int]]]:
        """Find out how long each test takes, and which lines of the module it runs."""
        read_end, write_end = os.pipe()

        def note() -> int:
            until = sum(os.times()[:4]) + TESTS_S
            with os.fdopen(write_end, "w") as out:
                for name, item in items.items():
                    if sum(os.times()[:4]) > until:
                        break
                    began = time.monotonic()
                    lines = set[int]()
                    with _LineTrace(str(self._file), lines):
                        is_passed = _passes(item, None)
                    if is_passed:
                        out.write(
                            json.dumps([name, time.monotonic() - began, sorted(lines)]) + "\n"
                        )
                        out.flush()
            return 0

        pid = _fork(note)
        os.close(write_end)
        with os.fdopen(read_end) as said:
            known = [json.loads(line) for line in said]
        os.waitpid(pid, 0)
        return {name: (seconds, lines) for name, seconds, lines in known}

    def _functions(self) -> list[FunctionType]:
        """Every function of the module, methods and what a decorator has wrapped included."""
        file = str(self._file)
        return [
            one
            for one in gc.get_objects()
            if isinstance(one, FunctionType) and one.__code__.co_filename == file
        ]

    def _try(
        self, items: list[pytest.Item], functions: list[FunctionType], before: str, after: str
    ) -> int:
        """Put a mutant in place and run tests; return the exit code of this process."""
        if not _put(str(self._file), functions, before, after):
            return UNTRIED
        for item, following in zip(items, [*items[1:], None], strict=True):
            if not _passes(item, following):
                return KILLED
        return 0


def _chosen(known: dict[str, tuple[float, list[int]]], line: int) -> tuple[list[str], float]:
    """
    Choose the tests of a line, the quickest first.

    A line that none runs in this process may run in a program that one starts: then it is those
    that ran nothing of the module here.
    """
    running = [name for name, (_, lines) in known.items() if line in lines]
    running = running or [name for name, (_, lines) in known.items() if not lines]
    chosen, seconds = [], 0.0
    for name in sorted(running, key=lambda name: known[name][0]):
        if chosen and seconds + known[name][0] > MUTANT_S:
            break
        chosen.append(name)
        seconds += known[name][0]
    return chosen, seconds


def _put(file: str, functions: list[FunctionType], before: str, after: str) -> bool:
    """Change the code of what is there from one source to another; say whether that was all."""
    changed: dict[tuple[str, int], CodeType] = {}
    is_whole = _compare(compile(before, file, "exec"), compile(after, file, "exec"), changed)
    if not is_whole or not changed:
        return False
    try:
        for function in functions:
            code = function.__code__
            new = changed.get((code.co_qualname, code.co_firstlineno))
            if new is not None:
                function.__code__ = new
    except ValueError:  # it has other free variables
        return False
    return True


def _compare(old: CodeType, new: CodeType, changed: dict[tuple[str, int], CodeType]) -> bool:
    """Note every function that differs; say whether nothing outside of functions does."""
    pairs = list(zip(_codes(old), _codes(new), strict=False))
    if len(_codes(old)) != len(_codes(new)):
        return False
    for inner, instead in pairs:
        if inner == instead:
            continue
        is_class_body = not inner.co_flags & 0x01  # CO_OPTIMIZED
        if is_class_body and not _compare(inner, instead, changed):
            return False
        if not is_class_body:
            changed[inner.co_qualname, inner.co_firstlineno] = instead
    # All else of a module or a class runs on import, where it is too late.
    return old.co_code == new.co_code and _plain(old) == _plain(new)


def _codes(code: CodeType) -> list[CodeType]:
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def _plain(code: CodeType) -> list[object]:
    return [each for each in code.co_consts if not isinstance(each, CodeType)]


class _LineTrace:
    """Collects the lines of a file that run, in every thread."""

    def __init__(self, file: str, lines: set[int]) -> None:
        self._file, self._lines = file, lines

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        if event == "line":
            self._lines.add(frame.f_lineno)
        return self._trace

    def __enter__(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    from _pytest.runner import runtestprotocol

    reports = runtestprotocol(item, log=False, nextitem=following)
    return all(report.passed or hasattr(report, "wasxfail") for report in reports)


# --- Forks --------------------------------------------------------------------------------------


def _fork(work: Callable[[], int]) -> int:
    """Do some work in a fork of this process, which says nothing; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = KILLED
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        code = work()
    finally:
        os._exit(code)


def _in_fork(work: Callable[[], int], deadline_s: float) -> int:
    """Do some work in a fork; return its exit code, or what is none if it had to be killed."""
    from tests.conftest import session_census
    from tests.support.census import MACHINE_WIDE

    before = session_census.census()
    pid = _fork(work)
    pidfd = os.pidfd_open(pid)
    try:
        ready = select.select([pidfd], [], [], deadline_s)[0]
    finally:
        os.close(pidfd)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0 or not ready:
        session_census.clean(session_census.left_since(before, MACHINE_WIDE, patience_s=0.2))
    return code
