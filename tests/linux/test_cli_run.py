"""A command runs inside an allocation as if it had been started here; they end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from linux.cli.exits import ExitCode
from linux.forge.spawn import spawn_within
from statemachine import AllocationEnded, NamespaceRequest
from tests.support.programs import (
    COMMAND,
    DEADLINE_S,
    PID,
    Daemon,
    environment,
    nshandoff,
    running,
    wait_until,
    warm_daemon_in,
)
from transport import endpoint
from transport.channel import Delivery, Received
from transport.descriptors import Descriptor

pytestmark = pytest.mark.needs_root

ALL = ("--namespaces", "pid,net,mount")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("daemon")
    with warm_daemon_in(directory, image_root, "--release-deadline", "0.3") as daemon:
        yield daemon


@pytest.fixture
def words(daemon: Daemon, allocation_id: str) -> tuple[str, ...]:
    return ("run", "--socket", str(daemon.socket), "--id", allocation_id)


def test_basic_command_is_inside_and_its_exit_status_comes_out(
    daemon: Daemon, words: tuple[str, ...], allocation_id: str, tmp_path: Path, cgroup2: Path
) -> None:
    script = f"""
        read line; echo $line; echo $$; pwd; cat {daemon.uenv_base}/hello/hello.txt
        ls -d /proc/[0-9]*; tail -n 1 /proc/self/cgroup; grep -c : /proc/net/dev
        echo complaint >&2; exit 7
    """
    command = ("--uenv", "hello.sqfs", "--", "sh", "-c", script)
    result = nshandoff(*words, *ALL, *command, cwd=tmp_path, stdin=None, input="from outside\n")
    assert (result.returncode, result.stderr) == (7, "complaint\n")
    assert result.stdout.splitlines() == [
        "from outside",
        "2",
        str(tmp_path),
        "hello from the image",
        "/proc/1",
        "/proc/2",
        f"0::/workload.slice/{allocation_id}.scope",
        "1",
    ]
    assert daemon.alive() == []
    assert not (cgroup2 / "workload.slice" / f"{allocation_id}.scope").exists()


def test_no_namespace_at_all_is_an_allocation_too(words: tuple[str, ...]) -> None:
    result = nshandoff(*words, "--namespaces", "", "--", "readlink", "/proc/self/ns/net")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == os.readlink("/proc/self/ns/net")


def test_death_by_signal_is_a_death_by_signal(words: tuple[str, ...]) -> None:
    result = nshandoff(*words, *ALL, "--", "sh", "-c", "kill -KILL $$")
    assert (result.returncode, result.stderr) == (-signal.SIGKILL, "")


def test_what_the_command_leaves_ends_with_it(words: tuple[str, ...], cgroup2: Path) -> None:
    left = "setsid sleep 1000 >/dev/null 2>&1 & exit 0"
    result = nshandoff(*words, "--namespaces", "net", "--", "sh", "-c", left)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(cgroup2.glob(f"workload.slice/{words[-1]}.scope"))


def test_signals_reach_the_command(words: tuple[str, ...]) -> None:
    names = ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "WINCH", "CONT")
    traps = "".join(f"trap 'echo {name}' {name}; " for name in names)
    script = f"{traps} trap 'echo TERM; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    with running(*words, *ALL, "--", "sh", "-c", script) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        for name in (*names, "TERM"):
            program.send_signal(signal.Signals[f"SIG{name}"])
            assert program.stdout.readline() == f"{name}\n"
        assert program.wait() == 3


def test_ignored_hangup_is_none_of_the_commands_business(words: tuple[str, ...]) -> None:
    script = "echo ready; read line; echo $line"
    program = ("nohup", *COMMAND, *words, *ALL, "--", "sh", "-c", script)
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGHUP)
        out, _ = run.communicate("still here\n")
        assert (run.returncode, out) == (0, "still here\n")


def test_ended_allocation_takes_the_command_along(
    daemon: Daemon, words: tuple[str, ...], allocation_id: str
) -> None:
    with running(*words, *ALL, "--", "sh", "-c", "echo ready; exec sleep 1000") as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        daemon.consumer().end(allocation_id)
        assert program.wait() == -signal.SIGKILL


def test_interruption_before_there_is_a_command_withdraws_the_request(
    tmp_path: Path, allocation_id: str
) -> None:
    """The provider takes the connection, and sends nothing until the end is requested."""
    path = tmp_path / "silent.sock"
    words = ("run", "--socket", path, "--id", allocation_id, "--fallback", "never")
    with (
        endpoint.listen(path) as listener,
        running(*words, *ALL, "--", "echo", "never") as program,
        closing(next_of(listener)) as first,
    ):
        assert isinstance(next_message(first), NamespaceRequest)
        program.send_signal(signal.SIGTERM)
        with closing(next_of(listener)) as second:
            assert next_message(second) == AllocationEnded(allocation_id)
            second.channel.send(AllocationEnded(allocation_id))
            out, _ = program.communicate()
        assert (program.returncode, out) == (-signal.SIGTERM, "")


def next_of(listener: endpoint.Listener) -> endpoint.Accepted:
    taken: list[endpoint.Accepted] = []
    wait_until(lambda: taken.extend(filter(None, [listener.accept()])) or taken)
    return taken[0]


def next_message(accepted: endpoint.Accepted) -> object:
    received: list[Received] = []
    wait_until(lambda: received.extend(accepted.channel.receive()) or received)
    assert isinstance(received[0], Delivery)
    return received[0].message


# --- What can go wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("no-such-command", ExitCode.NOT_FOUND, "No such file"),
        ("/etc/passwd", ExitCode.NOT_EXECUTABLE, "Permission denied"),
        ("/etc/passwd/x", ExitCode.NOT_EXECUTABLE, "Not a directory"),
    ],
)
def test_command_that_cannot_run_is_named(
    daemon: Daemon, words: tuple[str, ...], command: str, code: ExitCode, says: str
) -> None:
    result = nshandoff(*words, *ALL, "--", command)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr == f"nshandoff: {command}: {says}" + result.stderr.partition(says)[2]
    assert daemon.alive() == []


def test_refused_creation_is_reported_and_not_papered_over(words: tuple[str, ...]) -> None:
    result = nshandoff(*words, *ALL, "--uenv", "absent.sqfs", "--", "echo", "never")
    assert (result.returncode, result.stdout) == (ExitCode.RUN_FAILED, "")
    assert result.stderr.startswith("nshandoff: CreationFailed: ")
    assert "no such image" in result.stderr


def test_draining_is_said_and_not_waited_for(
    daemon: Daemon, words: tuple[str, ...], allocation_id: str
) -> None:
    """A process whose parent does not reap it, and which so holds up its PID namespace's init."""
    with running(*words, "--namespaces", "pid", "--", "sh", "-c", "echo ready; cat") as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with (
            daemon.obtain(allocation_id, PID) as handoff,
            spawn_within(["sleep", "1000"], handoff.bundle) as unreaped,
        ):
            _, result = program.communicate("")
            assert program.returncode == 0
            assert f"nshandoff: {allocation_id} has ended and is draining: " in result
            assert daemon.alive() == [allocation_id]
            unreaped.wait(DEADLINE_S)
    wait_until(lambda: not daemon.alive())


# --- Without a provider ------------------------------------------------------------------------


@pytest.mark.clause("SELF-4")
def test_without_a_provider_it_serves_itself_and_says_so_loudly(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    base = tmp_path / "uenv"
    places = ("--image-root", image_root, "--uenv-base", base, "--uenv", "hello.sqfs")
    script = f"echo $$; cat {base}/hello/hello.txt; tail -n 1 /proc/self/cgroup; exit 5"
    socket = ("--socket", tmp_path / "absent.sock", "--id", allocation_id)
    result = nshandoff("run", *socket, *places, *ALL, "--", "sh", "-c", script)
    assert result.returncode == 5
    assert result.stdout.splitlines() == [
        "2",
        "hello from the image",
        f"0::/workload.slice/{allocation_id}.scope",
    ]
    assert result.stderr.startswith("nshandoff: WARNING: namespace.handoff_failed: ")
    assert "serving itself" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.clause("SELF-6")
def test_refused_fallback_is_a_failure_of_its_own(tmp_path: Path) -> None:
    socket = ("--socket", tmp_path / "absent.sock", "--fallback", "never")
    result = nshandoff("run", *socket, *ALL, "--", "echo", "never")
    assert (result.returncode, result.stdout) == (ExitCode.RUN_FAILED, "")
    assert "SocketUnavailable: handoff socket unavailable: " in result.stderr


def test_failed_self_service_says_both_reasons(tmp_path: Path, image_root: Path) -> None:
    places = ("--image-root", image_root, "--uenv-base", tmp_path / "uenv", "--uenv", "absent")
    socket = ("--socket", tmp_path / "absent.sock")
    result = nshandoff("run", *socket, *places, *ALL, "--", "echo", "never")
    assert (result.returncode, result.stdout) == (ExitCode.RUN_FAILED, "")
    assert "CreationFailed: " in result.stderr
    assert "no such image" in result.stderr
    assert "absent.sock does not exist" in result.stderr


# --- At a terminal -----------------------------------------------------------------------------


class Terminal:
    """A terminal with a program on it that leads its session, as a login shell does."""

    def __init__(self, *command: str) -> None:
        self.leader, self.slave = map(Descriptor, os.openpty())
        self.seen = ""
        self.program = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=self.slave.fileno(),
            stdout=self.slave.fileno(),
            stderr=self.slave.fileno(),
            env=environment(),
        )

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until something has been shown."""
        while not (found := re.search(pattern, self.seen)):
            self.seen += os.read(self.leader.fileno(), 4096).decode()
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.leader.fileno(), text.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.leader.close()  # hangs up on the processes that are left
        self.slave.close()
        self.program.wait(DEADLINE_S)


def test_command_has_the_terminal_and_it_comes_back(words: tuple[str, ...]) -> None:
    show = "import os; print('foreground', os.tcgetpgrp(0) == os.getpgrp(), flush=True)"
    inside = f"{sys.executable} -I -S -c \"{show}; print('line', input())\""
    after = f'{sys.executable} -I -S -c "{show}"'
    script = f"{' '.join(COMMAND)} {' '.join(words)} --namespaces pid -- {inside}; {after}"
    with Terminal("sh", "-c", script) as terminal:
        assert terminal.wait_for(r"foreground (\w+)")[1] == "True"
        terminal.type("typed\n")
        terminal.wait_for("line typed")
        assert terminal.wait_for(r"foreground (\w+)")[1] == "True"
        assert terminal.program.wait(DEADLINE_S) == 0


def test_ctrl_c_is_the_commands(daemon: Daemon, words: tuple[str, ...]) -> None:
    # exec: a shell that is just starting a child may keep a Ctrl-C to itself.
    command = (
        *COMMAND,
        *words,
        "--namespaces",
        "pid",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    )
    with Terminal(*command) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x03")
        assert terminal.program.wait(DEADLINE_S) == -signal.SIGINT
        assert daemon.alive() == []


def test_ctrl_z_stops_both_and_fg_continues_both(words: tuple[str, ...]) -> None:
    inside = "sh -c 'echo ready; read line; echo line $line; exit 6'"
    job = f"{' '.join(COMMAND)} {' '.join(words)} --namespaces pid,net -- {inside}"
    script = f"{job}; echo stopped $?; jobs; fg; echo exited $?"
    with Terminal("bash", "-mc", script) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x1a")
        terminal.wait_for(f"stopped {128 + signal.SIGTSTP}")
        terminal.type("typed\n")
        terminal.wait_for("line typed")
        terminal.wait_for("exited 6")
        assert terminal.program.wait(DEADLINE_S) == 0


def test_ctrl_z_is_nothing_where_no_shell_could_continue(words: tuple[str, ...]) -> None:
    inside = ("sh", "-c", "echo ready; read line; echo line $line")
    with Terminal(*COMMAND, *words, "--namespaces", "pid", "--", *inside) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x1atyped\n")
        terminal.wait_for("line typed")
        assert terminal.program.wait(DEADLINE_S) == 0
