"""The provider as a daemon: its signals, limits, log and trace, and files that are full or gone."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from linux.cli.exits import ExitCode
from linux.cli.signals import _IGNORED, NOTED, STOPPING
from linux.limits import OOM_SCORE_ADJ_MIN, descriptors_for
from statemachine import NamespaceRequest
from statemachine.provider import Limits
from tests.support import programs
from tests.support.programs import (
    MOUNT,
    NET,
    PID,
    Daemon,
    daemon_in,
    nshandoff,
    run_program,
    wait_until,
)
from tests.support.scarcity import fill_disk, fill_pipe
from transport.descriptors import Descriptor
from transport.testing.peer import Line

pytestmark = pytest.mark.needs_root

STOP_S: Final = 2.0
"""How long a provider may take to stop, whatever is slow or full."""

STARTS_MAX: Final = 10
"""On a machine that others keep busy: how often a Python could start and end meanwhile."""


HEAP_BYTES: Final = 64 << 20
"""What malloc(3) of glibc reserves for each heap but the first, at a multiple of that."""


def stop_in_time(daemon: Daemon) -> None:
    began_s = time.monotonic()
    assert daemon.stop() == ExitCode.OK
    assert_short(time.monotonic() - began_s)


def assert_short(passed_s: float) -> None:
    """Have it be within `STOP_S`, or what that is on a machine that is busy otherwise."""
    if passed_s > STOP_S:
        began_s = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], check=True)
        assert passed_s < (time.monotonic() - began_s) * STARTS_MAX


def serve_one(daemon: Daemon, name: str) -> None:
    """Have one whole life, from the request to the release."""
    with daemon.obtain(name, PID, NET) as handoff:
        assert handoff.end()
    daemon.wait_until_none_is_alive()


def said(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    return [line for line in daemon.events() if line["event"] == event]


# --- Signals -----------------------------------------------------------------------------------


@pytest.mark.clause("DAEMON-4")
def test_no_signal_but_two_ends_it_and_what_it_ignores_it_says(
    daemon: Daemon, allocation_id: str
) -> None:
    """Of every kind: those that end a program by default, and those that a write may bring."""
    harmless = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    with daemon.obtain(allocation_id, PID, NET, MOUNT) as handoff:
        wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
        for number in sorted(NOTED | _IGNORED | harmless):
            os.kill(daemon.pid, number)
        wait_until(lambda: len(said(daemon, "signal_ignored")) == len(NOTED))
        (hangup,) = (x for x in said(daemon, "signal_ignored") if x["signal"] == "SIGHUP")
        assert "nothing to read again" in hangup["message"]
        with daemon.obtain(allocation_id, PID, NET, MOUNT) as again:
            assert again.identities == handoff.identities
        assert handoff.end()


def test_every_signal_is_stopping_noted_ignored_or_left_to_its_default() -> None:
    """What ends a process by default, signal(7), and is no fault of the program."""
    ending = {"HUP", "QUIT", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "POLL", "PWR", "STKFLT"}
    named = {getattr(signal, f"SIG{name}") for name in ending if hasattr(signal, f"SIG{name}")}
    real_time = set(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    assert named | real_time | {signal.SIGXCPU} == {*NOTED}
    assert not NOTED & STOPPING


@pytest.mark.clause("DAEMON-4")
@pytest.mark.parametrize("number", sorted(STOPPING))
def test_signal_stops_it_while_it_starts(
    tmp_path: Path, image_root: Path, number: signal.Signals
) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.begin()
    wait_until(lambda: daemon.log.read_text())
    assert daemon.stop(number) == ExitCode.OK
    assert [line["event"] for line in daemon.events()][-2:] == ["stopping", "stopped"]
    assert not daemon.ready.exists()
    assert not daemon.socket.exists()


WATCHFUL: Final = """
import sys
from linux.cli import command, place
place.PERIOD_S = 0.001
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.clause("DAEMON-4")
def test_stop_with_work_under_way_is_no_loss_of_the_socket(
    tmp_path: Path, image_root: Path, allocation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "COMMAND", (sys.executable, "-c", WATCHFUL))
    daemon = Daemon(tmp_path, image_root)
    daemon.start()
    try:
        with Line.to(daemon.socket) as line:
            for number in range(20):
                line.say(NamespaceRequest(f"{allocation_id}-{number}", (PID, NET)))
            wait_until(lambda: daemon.states())
            assert daemon.stop() == ExitCode.OK
        assert said(daemon, "place_lost") == []
    finally:
        daemon.clear()
        daemon.stop()


@pytest.mark.clause("DAEMON-4")
def test_signal_that_was_pending_when_it_was_started_stops_it(
    tmp_path: Path, image_root: Path
) -> None:
    daemon = Daemon(tmp_path, image_root)
    pending = 'kill -TERM $$; exec "$@"'
    daemon.prefix = ("env", "--block-signal=TERM", "sh", "-c", pending, "sh")
    daemon.begin()
    assert daemon.program is not None
    assert daemon.program.wait(20) == ExitCode.OK
    assert [line["event"] for line in daemon.events()] == ["stopping", "stopped"]


@pytest.mark.clause("DAEMON-4")
def test_signal_interrupts_nothing_that_is_done_to_start() -> None:
    """Not even what is one instruction from its end: locks are free, what was made has an owner."""
    program = """
import os, signal
from linux.cli.signals import Signals, Stopped
done = 0
def start():
    global done
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    while done < 1_000_000:
        done += 1
with Signals() as signals:
    try:
        signals.wait_for(start)
    except Stopped as stopped:
        print(done, stopped.number in (signal.SIGTERM, signal.SIGINT), stopped.has_hung)
"""
    printed = run_program(sys.executable, "-c", program).stdout.split()
    assert printed == ["1000000", "True", "False"]


HANGING: Final = """
import sys, threading
from linux.cli import command, serve, signals
signals.STOP_TIMEOUT_S = 0.1
serve._backend = lambda options, stack: threading.Event().wait()
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.clause("DAEMON-4")
def test_signal_stops_it_when_its_start_hangs(
    tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "COMMAND", (sys.executable, "-c", HANGING))
    daemon = Daemon(tmp_path, image_root)
    daemon.begin()
    wait_until(lambda: daemon.log.read_text())
    assert daemon.stop() == ExitCode.OK
    assert [line["event"] for line in daemon.events()] == ["starting", "stopping", "stopped"]


@pytest.mark.clause("DAEMON-4")
def test_more_signals_while_it_stops_change_nothing(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.start()
    serve_one(daemon, allocation_id)
    program = daemon.program
    assert program is not None
    while program.poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            program.send_signal(number)
        time.sleep(0.001)
    assert program.returncode == ExitCode.OK
    assert daemon.events()[-1]["event"] == "stopped"


@pytest.mark.clause("DAEMON-4")
def test_what_was_blocked_or_ignored_when_it_was_started_is_not(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    prefix = ("env", "--block-signal", "--ignore-signal=TERM,CHLD,HUP")
    with daemon_in(tmp_path, image_root, prefix=prefix) as daemon:
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: said(daemon, "signal_ignored"))
        serve_one(daemon, allocation_id)


# --- Limits ------------------------------------------------------------------------------------


def limit_of(pid: int | str) -> tuple[int, int]:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft), int(hard)
    raise AssertionError(pid)


def oom_score_adj(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def helpers_of(cgroup2: Path) -> list[str]:
    """The forge and the anchors, of all providers that can be seen."""
    return [
        pid
        for cgroup in (cgroup2 / "pact.slice").glob("*.scope")
        for pid in (cgroup / "cgroup.procs").read_text().split()
    ]


@pytest.mark.clause("DAEMON-1")
def test_soft_limit_is_raised_for_the_provider_alone(
    tmp_path: Path, image_root: Path, cgroup2: Path, allocation_id: str
) -> None:
    with (
        daemon_in(tmp_path, image_root, prefix=("prlimit", "--nofile=64:3000")) as daemon,
        daemon.obtain(allocation_id, PID) as handoff,
    ):
        helpers = helpers_of(cgroup2)
        assert len(helpers) == 2  # the forge and the anchor
        assert {pid: limit_of(pid) for pid in helpers} == dict.fromkeys(helpers, (64, 3000))
        assert limit_of(daemon.pid) == (3000, 3000)
        assert handoff.end()


@pytest.mark.clause("DAEMON-1")
def test_more_are_served_at_once_than_the_soft_limit_has_descriptors_for(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    prefix = ("prlimit", "--nofile=128:4000")
    with daemon_in(tmp_path, image_root, prefix=prefix) as daemon, ExitStack() as stack:
        for number in range(40):
            stack.enter_context(daemon.obtain(f"{allocation_id}-{number}"))
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) > 128


@pytest.mark.clause("DAEMON-2")
def test_limits_follow_the_descriptors_there_are_and_that_is_said(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    """With these limits as many consumers as are let in are served, and others told the limit."""
    prefix = ("prlimit", "--nofile=64:288")
    with daemon_in(tmp_path, image_root, prefix=prefix) as daemon, ExitStack() as stack:
        (lowered,) = said(daemon, "limits_lowered")
        assert (lowered["connections_per_uid"], lowered["allocations_per_uid"]) == (8, 8)
        assert "288" in lowered["message"]
        assert "RLIMIT_NOFILE" in lowered["message"]
        for number in range(8):
            stack.enter_context(daemon.obtain(f"{allocation_id}-{number}", PID))
        refused = nshandoff(
            *("request", "--id", f"{allocation_id}-8", "--namespaces", "pid"),
            *("--socket", daemon.socket, "--fallback", "never"),
        )
    assert "limit reached" in refused.stderr
    assert refused.returncode == ExitCode.NO


def test_enough_descriptors_are_not_worth_a_word(tmp_path: Path, image_root: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with daemon_in(tmp_path, image_root) as daemon:
        assert bool(said(daemon, "limits_lowered")) is (hard < descriptors_for(Limits()))
        assert said(daemon, "starting")[0]["descriptors"] == hard


def lowest_oom_score_adj() -> int:
    """Find out what is permitted here, from 500 on."""
    program = (
        f"for value in {OOM_SCORE_ADJ_MIN} 0; do "
        "echo $value >/proc/$$/oom_score_adj && break; done 2>/dev/null; "
        "cat /proc/$$/oom_score_adj"
    )
    return int(run_program("choom", "--adjust", "500", "--", "bash", "-c", program).stdout)


@pytest.mark.clause("DAEMON-3")
def test_anchor_of_self_service_is_protected_and_its_workload_is_not(tmp_path: Path) -> None:
    script = "cat /proc/1/oom_score_adj /proc/self/oom_score_adj"
    words = ("run", "--socket", tmp_path / "absent", "--namespaces", "pid,mount", "--")
    shown = nshandoff(*words, "sh", "-c", script, within=("choom", "--adjust", "500", "--"))
    assert shown.stdout.split() == [str(lowest_oom_score_adj()), "500"]


@pytest.mark.clause("DAEMON-3")
def test_provider_and_anchors_are_protected_from_the_oom_killer_and_workloads_are_not(
    tmp_path: Path, image_root: Path, cgroup2: Path, allocation_id: str
) -> None:
    before = oom_score_adj("self")
    protected = lowest_oom_score_adj()
    with daemon_in(tmp_path, image_root, prefix=("choom", "--adjust", "500", "--")) as daemon:
        assert said(daemon, "starting")[0]["oom_score_adj"] == protected
        with daemon.obtain(allocation_id, PID) as handoff:
            found = [oom_score_adj(pid) for pid in (daemon.pid, *helpers_of(cgroup2))]
            assert found == [protected] * 3
            assert handoff.end()
        shown = nshandoff(
            *("run", "--socket", daemon.socket, "--namespaces", "pid", "--"),
            *("sh", "-c", "cat /proc/self/oom_score_adj; ulimit -Sn; ulimit -Hn"),
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert shown.stdout.split() == [str(before), str(soft), str(hard)]


def heaps(pid: int) -> int:
    """How many heaps a process has besides the first: what they are to have is reserved."""
    starts = [
        int(line.split("-")[0], 16)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if " rw-p 00000000 00:00 0" in line
    ]
    return sum(start % HEAP_BYTES == 0 for start in starts)


def test_threads_of_a_provider_share_a_heap(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    with daemon_in(tmp_path, image_root) as daemon:
        for number in range(4):
            with daemon.obtain(f"{allocation_id}-{number}", NET) as handoff:
                assert handoff.end()
        assert heaps(daemon.pid) == 0


# --- Log and trace -----------------------------------------------------------------------------


@contextmanager
def full_pipe(_: Path) -> Iterator[int]:
    reading, writing = map(Descriptor, os.pipe())
    with reading, writing:
        fill_pipe(writing.fileno())
        yield writing.fileno()


@contextmanager
def closed_pipe(_: Path) -> Iterator[int]:
    reading, writing = map(Descriptor, os.pipe())
    with writing:
        reading.close()
        yield writing.fileno()


@contextmanager
def stopped_terminal(_: Path) -> Iterator[int]:
    """As after Ctrl-S, with its room used up."""
    master, slave = map(Descriptor, os.openpty())
    with master, slave:
        termios.tcflow(slave.fileno(), termios.TCOOFF)
        fill_pipe(slave.fileno())
        yield slave.fileno()


@contextmanager
def full_disk(disk: Path) -> Iterator[int]:
    with Descriptor(os.open(disk / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)) as file:
        fill_disk(disk)
        yield file.fileno()


@contextmanager
def full_device(_: Path) -> Iterator[int]:
    with Descriptor(os.open("/dev/full", os.O_WRONLY)) as file:
        yield file.fileno()


SLOW_OR_FULL: Final = (
    *[("log", file) for file in (full_pipe, stopped_terminal, full_disk, full_device, closed_pipe)],
    # As a trace a pipe is opened for reading as well, so it is never closed.
    *[("trace", file) for file in (full_pipe, stopped_terminal, full_disk, full_device)],
    *[("audit", file) for file in (full_pipe, full_disk)],
)


@pytest.mark.sample(3)
@pytest.mark.clause("DAEMON-6")
@pytest.mark.parametrize(("what", "sink"), SLOW_OR_FULL)
def test_log_and_trace_that_cannot_be_written_stop_nothing(
    tmp_path: Path,
    image_root: Path,
    small_disk: Path,
    allocation_id: str,
    what: str,
    sink: Callable[[Path], Any],
) -> None:
    with sink(small_disk) as file:
        where = f"/proc/{os.getpid()}/fd/{file}"
        options = () if what == "log" else (f"--{what}", where)
        daemon = Daemon(tmp_path, image_root, *options)
        daemon.stderr = file if what == "log" else None
        daemon.start()
        serve_one(daemon, allocation_id)
        stop_in_time(daemon)
        if what == "trace":
            assert said(daemon, "trace_lines_lost")[-1]["count"] > 5
        if (what, sink) == ("audit", full_disk):
            assert said(daemon, "audit_lines_lost") != []


@pytest.mark.clause("DAEMON-6")
def test_lost_lines_of_the_log_are_counted_in_the_next_one(
    tmp_path: Path, image_root: Path, small_disk: Path, allocation_id: str
) -> None:
    log = small_disk / "log"
    with Descriptor(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)) as file:
        daemon = Daemon(tmp_path, image_root)
        daemon.stderr = file.fileno()
        daemon.start()
        fillers = fill_disk(small_disk)
        for number in range(5):
            serve_one(daemon, f"{allocation_id}-{number}")
        shutil.rmtree(fillers)
        os.kill(daemon.pid, signal.SIGHUP)
        stop_in_time(daemon)
    lines = [json.loads(line) for line in log.read_bytes().splitlines() if line.endswith(b"}")]
    (lost,) = (line for line in lines if line["event"] == "lines_lost")
    assert (lost["level"], lost["count"] >= 5) == ("warning", True)
    assert "no space or no inode left" in lost["message"]
    assert lines[-1]["event"] == "stopped"


@pytest.mark.clause("DAEMON-6")
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_closed_standard_streams_are_no_files_of_ours(
    tmp_path: Path, image_root: Path, allocation_id: str, closed: str
) -> None:
    closing = " ".join(f"{fd}>&-" for fd in closed.split())
    prefix = ("sh", "-c", f'exec "$0" "$@" {closing}')
    with daemon_in(tmp_path, image_root, prefix=prefix) as daemon:
        serve_one(daemon, allocation_id)
        for fd in closed.split():
            assert os.readlink(f"/proc/{daemon.pid}/fd/{fd}") == "/dev/null"


@pytest.mark.clause("DAEMON-6")
@pytest.mark.parametrize("what", ["log", "trace"])
def test_frozen_file_system_stops_nothing(
    tmp_path: Path, image_root: Path, allocation_id: str, what: str
) -> None:
    """Only the process itself cannot go, while a write of its own hangs in the Linux kernel."""
    image, disk = tmp_path / "image", tmp_path / "frozen"
    disk.mkdir()
    with image.open("wb") as made:
        made.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    with ExitStack() as undo:
        undo.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
        options = () if what == "log" else ("--trace", str(disk / "trace"))
        daemon = Daemon(tmp_path, image_root, *options)
        if what == "log":
            file = os.open(disk / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            daemon.stderr = undo.enter_context(Descriptor(file)).fileno()
        daemon.start()
        with ExitStack() as thaw:
            subprocess.run(["fsfreeze", "--freeze", disk], check=True)
            thaw.callback(subprocess.run, ["fsfreeze", "--unfreeze", disk], check=True)
            serve_one(daemon, allocation_id)
            os.kill(daemon.pid, signal.SIGTERM)
            began_s = time.monotonic()
            wait_until(lambda: not daemon.socket.exists())
            assert_short(time.monotonic() - began_s)
        assert daemon.program is not None
        assert daemon.program.wait(20) == ExitCode.OK


TELLING: Final = (
    "import atexit, sys\n"
    "from linux.cli.command import main\n"
    "atexit.register(lambda: print(sys.getswitchinterval()))\n"
    "sys.exit(main())"
)
"""The command, which says at its end how long its threads have waited for each other at most."""


def test_a_busy_event_loop_lets_the_threads_that_make_namespaces_go_on(
    tmp_path: Path, image_root: Path
) -> None:
    """
    A creation is dozens of system calls in a thread, and each ends with a wait for the interpreter.

    While a peer keeps the event loop busy that is the switch interval, or more. With the usual 5 ms
    a polite consumer's creation took 60 to 200 ms beside "unknown ends" of bench/fairness.py.
    """
    daemon = Daemon(tmp_path, image_root)
    places = [sys.executable, "-c", TELLING, *daemon.words]
    with subprocess.Popen(places, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        wait_until(daemon.ready.exists)
        program.terminate()
        said, _ = program.communicate()
    assert float(said) < 0.0001
