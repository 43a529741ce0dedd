"""`nshandoff demo`: two allocations from request to release, and what the Linux kernel says to it.

    command       this file: the command; prepares, plays, compares
    story         what happens, one step after the other
    claims        what is claimed of it, and whom it asks
    stage         what can be shown on this machine, and how without root
    cast          the provider, and the residents inside the allocations
    inside        what a resident runs
    report        what is said and checked
    census        what is there before and after

Nothing here is a print of hope. A provider runs in a process of its own, a consumer asks it for
namespaces as any consumer would (`transport.request`), and every line that begins with `ok` is an
answer of the Linux kernel that was compared with what the protocol promises.

EXIT CODES
    0     every check held
    1     a check did not hold; which one, what was expected and what was found has been said
    2     the command line makes no sense
    3     this machine, or this user on it, cannot show it
    128+N stopped by signal N, and cleaned up: 130 is Ctrl-C
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

from statemachine.errors import NamespaceError

from .cast import CastError
from .census import Census, Traces
from .claims import settled
from .report import Interrupted, Report
from .stage import (
    OUTSIDE_VARIABLE,
    PREFIX,
    Stage,
    StageError,
    enter_user_namespace,
    is_root_here,
    real_stage,
    simulated_stage,
    why_no_user_namespace,
)
from .story import Story

_EXIT_FAILED: Final = 1
_EXIT_CANNOT: Final = 3
_EXIT_SIGNAL: Final = 128


def main(arguments: list[str], *, overrule: Mapping[str, object] | None = None) -> int:
    """
    Be the command.

    Without root it executes itself anew in a user namespace of its own, and does not return.

    Args:
        arguments: Without the program's name and the verb.
        overrule: Expectations in the place of the real ones, by the name of their check: how a
            test sees that a check can fail.

    Returns:
        What to exit with; the table is in this module's head.
    """
    options = _parse(arguments)
    out = None if options.json else sys.stdout
    why = None
    if options.backend != "simulated" and not is_root_here():
        why = why_no_user_namespace()
        if why is None:
            enter_user_namespace(arguments)
        if options.backend == "linux":
            return _say_cannot(options, f"no root, and no user namespace either: {why}")
        why = f"only simulated here: no root, and no user namespace either ({why})"
    is_simulated = options.backend == "simulated" or why is not None
    with _signals() as caught:
        report = Report(
            out,
            is_coloured=_is_coloured(out),
            is_stopped=lambda: bool(caught),
            overrule=overrule,
        )
        began_s = time.monotonic()
        try:
            perform(report, is_simulated=is_simulated, why=why)
            seconds = time.monotonic() - began_s
            report.verdict(seconds)
        except StageError as error:
            return _say_cannot(options, str(error))
        except Interrupted:
            return _say_interrupted(caught)
    if options.json:
        print(json.dumps(report.as_json(seconds), indent=2))
    return _EXIT_FAILED if report.failures else 0


def perform(report: Report, *, is_simulated: bool, why: str | None = None) -> None:
    """
    Play it all, and clean up whatever happens.

    What goes wrong on the way is a check that does not hold.

    Args:
        report: What is said and checked.
        is_simulated: Whether on a simulated node instead of this one.
        why: The reason for that, if it was not asked for.

    Raises:
        StageError: this machine cannot show it.
        Interrupted: the report was told to stop.
    """
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        before = Census.take(Traces(folder))
        _introduce(report)
        clock = time.monotonic
        stage = simulated_stage(folder, why) if is_simulated else real_stage(folder, clock)
        cleanup.callback(stage.close)
        story = Story(stage, report, clock)
        cleanup.callback(story.close)
        try:
            story.tell()
        except (NamespaceError, CastError, OSError) as error:
            report.check("story", "the demonstration comes to its end", "no error", str(error))
        traces = story.traces()
    _compare(report, before, traces, stage)


# --- Before and after --------------------------------------------------------------------------


def _introduce(report: Report) -> None:
    report.title("nshandoff demo: two allocations from request to release")
    outside = os.environ.get(OUTSIDE_VARIABLE)
    user = f"user {os.geteuid()}"
    if outside is not None:
        user = f"user {outside}, root in a user namespace"
    kernel = f"{platform.system()} {platform.release()}, {platform.machine()}"
    report.fact("machine", f"{kernel}, {user}")


def _compare(report: Report, before: Census, traces: Traces, stage: Stage) -> None:
    """Count once more, and compare; what the Linux kernel frees in the background may take."""
    report.section("CENSUS", "what was there before, and what is there now")

    def grown() -> list[str]:
        _reap_orphans()
        now = Census.take(traces)
        return [sort for sort in _SORTS if getattr(now, sort) != getattr(before, sort)]

    settled(grown)
    now = Census.take(traces)
    for sort, claim in _SORTS.items():
        is_bare = sort in _BARE and stage.is_simulated
        if is_bare or (sort == "cgroups" and stage.cgroup2 is None):
            continue
        then, here = (sorted(getattr(census, sort)) for census in (before, now))
        report.check(f"census.{sort}", claim, then, here, f"{len(then)} = {len(here)}")


def _reap_orphans() -> None:
    """In its own PID namespace this is the init, and the orphans of a provider come to it."""
    if os.getpid() == 1:
        with suppress(ChildProcessError):
            while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
                pass


_SORTS: Final = {
    "descriptors": "this process's open descriptors",
    "children": "its child processes",
    "namespace_members": "processes in any of the six namespaces",
    "mounts": "mounts with our folder in them",
    "loop_devices": "loop devices with our image",
    "cgroups": "cgroups of the allocations and their inits",
}
"""What is compared, and how each is called."""

_BARE: Final = ("namespace_members", "mounts", "loop_devices", "cgroups")
"""What a simulated node cannot leave behind."""


# --- The command -------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nshandoff demo",
        description=(
            "Run two allocations from request to release on this machine, and check with the\n"
            "Linux kernel what it shows. Takes about a second and leaves nothing behind. Without\n"
            "root it shows as much as a user namespace of its own allows, and names the rest."
        ),
        epilog="exit codes:" + (__doc__ or "").partition("EXIT CODES")[2].rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "linux", "simulated"],
        default="auto",
        help="real namespaces, a simulated node, or whatever this user may (default)",
    )
    parser.add_argument("--json", action="store_true", help="show one JSON object at the end")
    return parser.parse_args(arguments)


def _say_cannot(options: argparse.Namespace, text: str) -> int:
    if options.json:
        print(json.dumps({"holds": False, "cannot": text}, indent=2))
    print(f"nshandoff: {text}", file=sys.stderr)
    return _EXIT_CANNOT


def _say_interrupted(caught: list[int]) -> int:
    if not caught:
        # Nobody reads any more. What could not be written must not be tried again at the exit.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  it is the last one
        return _EXIT_SIGNAL + signal.SIGPIPE
    print("nshandoff: interrupted; everything is cleaned up", file=sys.stderr)
    return _EXIT_SIGNAL + caught[0]


def _is_coloured(out: TextIO | None) -> bool:
    if out is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return out.isatty()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM while the body runs: it looks for itself when it can be stopped."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, disposition in before.items():
            signal.signal(number, disposition)
