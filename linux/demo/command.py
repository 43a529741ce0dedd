"""`nshandoff demo`: show two allocations from request to release, checked with the Linux kernel.

    command       this file: the command; prepares, runs the scenario, compares before and after
    scenario      what happens, in order
    claims        what is checked on the way
    host          what this machine and user allow; without root, a user namespace
    processes     the provider, and a process inside each allocation
    inside        what the process inside executes
    report        the output: lines of text, or JSON
    census        what there is before and after

A provider runs in a process of its own, and a consumer requests namespaces like any other
(`transport.request`). Every line that begins with `ok` is a check against the Linux kernel: its
answer was compared with what the protocol promises.

EXIT CODES
    0     every check held
    1     a check did not hold; it has been printed with what was expected and what was found
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

from ..cli.parser import Parser
from .census import Inventory, Traces
from .claims import settled
from .host import (
    OUTSIDE_VARIABLE,
    PREFIX,
    CannotShow,
    Host,
    enter_user_namespace,
    is_root_here,
    real_host,
    refuse_chroot,
    simulated_host,
    why_no_user_namespace,
)
from .processes import DemoError
from .report import DemoStopped, Report
from .scenario import Demonstration

_EXIT_FAILED: Final = 1
_EXIT_CANNOT: Final = 3
_EXIT_SIGNAL: Final = 128


def main(arguments: list[str], *, overrule: Mapping[str, object] | None = None) -> int:
    """
    Run the command.

    Without root it executes itself again in a user namespace of its own, and does not return.

    Args:
        arguments: Without the program's name and the verb.
        overrule: Expected values that replace the real ones, by the name of their check; for
            tests that a check can fail.

    Returns:
        The exit code; the table is in this module's docstring.
    """
    options = _parse(arguments)
    out = None if options.json else sys.stdout
    why = None
    if not Path("/proc/self").exists():
        return _say_cannot(options, "there is no /proc here: mount -t proc proc /proc")
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
        except CannotShow as error:
            return _say_cannot(options, str(error))
        except DemoStopped:
            return _say_interrupted(caught)
    if options.json:
        print(json.dumps(report.as_json(seconds), indent=2))
    return _EXIT_FAILED if report.failures else 0


def perform(report: Report, *, is_simulated: bool, why: str | None = None) -> None:
    """
    Run the whole demonstration, and clean up in every case.

    An error on the way counts as a check that does not hold.

    Args:
        report: Where results go.
        is_simulated: Whether to use a simulated node instead of this one.
        why: The reason for that, if it was not requested.

    Raises:
        CannotShow: this machine cannot show it.
        DemoStopped: the report was told to stop.
    """
    if not is_simulated:
        refuse_chroot()
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        before = Inventory.take(Traces(folder))
        _introduce(report)
        clock = time.monotonic
        try:
            host = simulated_host(folder, why) if is_simulated else real_host(folder, clock)
        except OSError as error:
            raise CannotShow(str(error)) from error
        cleanup.callback(host.close)
        scenario = Demonstration(host, report, clock)
        cleanup.callback(scenario.close)
        try:
            scenario.run()
        except (NamespaceError, DemoError, OSError) as error:
            report.check("story", "the demonstration comes to its end", "no error", str(error))
        traces = scenario.traces()
    _compare(report, before, traces, host)


# --- Before and after --------------------------------------------------------------------------


def _introduce(report: Report) -> None:
    report.title("nshandoff demo: two allocations from request to release")
    outside = os.environ.get(OUTSIDE_VARIABLE)
    user = f"user {os.geteuid()}"
    if outside is not None:
        user = f"user {outside}, root in a user namespace"
    kernel = f"{platform.system()} {platform.release()}, {platform.machine()}"
    report.fact("machine", f"{kernel}, {user}")


def _compare(report: Report, before: Inventory, traces: Traces, host: Host) -> None:
    """Count again and compare, once the Linux kernel has freed what it frees in the background."""
    report.section("CENSUS", "what was there before, and what is there now")

    def grown() -> list[str]:
        _reap_orphans()
        now = Inventory.take(traces)
        return [sort for sort in _SORTS if getattr(now, sort) != getattr(before, sort)]

    settled(grown)
    now = Inventory.take(traces)
    for sort, claim in _SORTS.items():
        is_bare = sort in _BARE and host.is_simulated
        if is_bare or (sort == "cgroups" and host.cgroup2 is None):
            continue
        then, here = (sorted(getattr(census, sort)) for census in (before, now))
        report.check(f"census.{sort}", claim, then, here, f"{len(then)} = {len(here)}")


def _reap_orphans() -> None:
    """Reap orphans: in a PID namespace of its own this process is the init."""
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
"""What is compared, with its description."""

_BARE: Final = ("namespace_members", "mounts", "loop_devices", "cgroups")
"""What a simulated node cannot leave behind."""


# --- The command -------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="nshandoff demo",
        description=(
            "Run two allocations from request to release on this machine, and check with the\n"
            "Linux kernel what it shows. Takes about a second and leaves nothing behind. Without\n"
            "root it shows as much as a user namespace of its own allows, and names the rest."
        ),
        epilog="exit codes:" + (__doc__ or "").partition("EXIT CODES")[2].rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        # The reader is gone. What could not be written must not be tried again at the exit.
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
    """Record SIGINT and SIGTERM while the body runs, which checks when it can be stopped."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, disposition in before.items():
            signal.signal(number, disposition)
