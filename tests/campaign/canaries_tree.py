"""Run a function of the suite on a changed copy of the source tree, in a process of its own.

The copy is a directory that links to everything in the repository, except for the package that is
changed, which is copied. What runs there imports from the copy, and so do the programs that it
starts. The process is forked from this one, to save time: other packages are imported already, and
ours are imported anew.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from tests.support.census import remove_scopes_of

ROOT: Final = Path(__file__).resolve().parents[2]
DEADLINE_S: Final = 60.0
"""When a process that does not come to an end is taken for one that hangs."""

_PACKAGES: Final = ("statemachine", "transport", "linux", "specs", "tests")
_UNSHARED: Final = ("__pycache__", "mutants")


class Misfit(AssertionError):
    """A change does not fit the source any more: it has to be written anew, or left out."""


@dataclass(frozen=True)
class Change:
    """Some lines of a file that read otherwise."""

    path: str
    """From the root of the repository."""
    old: str
    """Stands in the file exactly once."""
    new: str

    def applied(self, before: str | None = None) -> str:
        """
        Return the whole file as it reads with the change; `before`: as it has been changed already.

        Raises:
            Misfit: `old` does not stand there exactly once.
        """
        source = before if before is not None else (ROOT / self.path).read_text(encoding="utf-8")
        count = source.count(self.old)
        if count != 1:
            raise Misfit(f"{self.path} has these lines {count} times, not once:\n{self.old}")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class CanaryResult:
    """What came of a run on a changed tree."""

    finding: str | None
    """What was found wrong, in one line; None if nothing was."""
    seconds: float
    """How long that took, without the making of the tree and the preparations."""
    account: str = ""
    """All of it, to be read when the finding is a surprise."""


def run_changed(
    changed: dict[str, str], call: str, *arguments: Any, deadline_s: float = DEADLINE_S
) -> CanaryResult:
    """
    Have a function run in a process where some files read otherwise.

    Args:
        changed: what files of ours read there, by their path from the root.
        call: `module:function`; imported from the copy. It prepares, and returns what is to be
            run. What either raises is the finding.
        arguments: for the function; as JSON can say them.
        deadline_s: after that it is killed, and has been found to hang.
    """
    with _copy(changed) as copy, tempfile.TemporaryFile() as said:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _run(copy, said.fileno(), write_end, call, arguments)
        os.close(write_end)
        try:
            report = _await_report(read_end, deadline_s)
        finally:
            os.close(read_end)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            # A bug that was seeded may leave what its test would have found.
            left = remove_scopes_of(pid)
        said.seek(0)
        output = said.read().decode("utf-8", "replace")
    assert not left, left
    if report is None:
        return CanaryResult(f"no end within {deadline_s:g} s", deadline_s, output)
    return CanaryResult(**{**json.loads(report), "account": output})


def _await_report(read_end: int, deadline_s: float) -> bytes | None:
    deadline, report = time.monotonic() + deadline_s, b""
    while select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(read_end, 65_536)
        if not part:
            return report or b'{"finding": "its process died", "seconds": 0.0}'
        report += part
    return None


@contextmanager
def _copy(changed: dict[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nsh-tree-") as folder:
        copy = Path(folder)
        packages = {Path(path).parts[0] for path in changed}
        for entry in ROOT.iterdir():
            if entry.name in packages:
                # With what is compiled already: it is known by the time and size of its source.
                shutil.copytree(entry, copy / entry.name)
            elif not entry.name.startswith(".") and entry.name not in _UNSHARED:
                (copy / entry.name).symlink_to(entry)
        for path, source in changed.items():
            (copy / path).write_text(source, encoding="utf-8")
        yield copy


def _run(copy: Path, said: int, write_end: int, call: str, arguments: Any) -> NoReturn:
    """Call the function in this process, a fork, and end it; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(said, number)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
        _import_from(copy)
        report = _report(call, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(write_end, json.dumps(asdict(report)).encode())
        status = 0
    finally:
        os._exit(status)


def _import_from(copy: Path) -> None:
    """Forget everything of ours that is imported, and find it here from now on."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = "site-packages" not in file and Path(file).is_relative_to(ROOT)
        # A package without a file of its own would still have its old modules.
        if is_ours or name.partition(".")[0] in _PACKAGES:
            del sys.modules[name]
    # What a pytest around us has installed would rewrite the assertions of what is imported here.
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "AssertionRewritingHook"]
    importlib.invalidate_caches()
    sys.path[:] = [str(copy), *(p for p in sys.path if p != str(ROOT))]
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(copy)


def _report(call: str, arguments: Any) -> CanaryResult:
    start = time.perf_counter()
    finding = None
    try:
        module, _, function = call.partition(":")
        prepare: Callable[..., Callable[[], None]]
        prepare = getattr(importlib.import_module(module), function)
        run = prepare(*arguments)
        start = time.perf_counter()
        run()
    except BaseException as error:
        traceback.print_exc()
        finding = _one_line(error)
    return CanaryResult(finding, time.perf_counter() - start)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
