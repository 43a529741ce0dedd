"""A command runs inside an allocation as if it had been started here; they end together."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from linux.cgroups import Scope, remove_slices
from linux.cli import command as cli
from linux.cli.exits import ExitCode
from linux.cli.run import _is_from_within
from linux.forge import spawn as forge_spawn
from linux.forge.spawn import spawn_within
from statemachine import AllocationEnded, NamespaceRequest
from tests.support import exec_probe
from tests.support.programs import (
    COMMAND,
    DEADLINE_S,
    INSTALLED,
    PID,
    Daemon,
    environment,
    nshandoff,
    running,
    wait_until,
    warm_daemon,
)
from transport import endpoint
from transport.channel import Delivery, Received
from transport.descriptors import Descriptor

__all__ = ["warm_daemon"]

pytestmark = pytest.mark.needs_root

ALL = ("--namespaces", "pid,net,mount")


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


@pytest.mark.clause("RUN-4")
def test_signals_reach_the_command(words: tuple[str, ...]) -> None:
    names = ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "WINCH", "CONT")
    names += ("ABRT", "PIPE", "SEGV", "XCPU", "XFSZ", "VTALRM", "PROF", "PWR", "URG", "IO")
    names += ("TSTP", "TTIN", "TTOU", "TRAP", "BUS", "SYS")
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


def test_real_time_signals_reach_the_command_in_their_order(words: tuple[str, ...]) -> None:
    script = (
        "import signal, sys\n"
        "numbers = range(signal.SIGRTMIN, signal.SIGRTMAX + 1)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)\n"
        "print('ready', flush=True)\n"
        "print(*(signal.sigwait(numbers) for _ in range(4)))"
    )
    with running(*words, *ALL, "--", sys.executable, "-I", "-S", "-c", script) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        for offset in (5, 5, 5, 9):
            program.send_signal(signal.SIGRTMIN + offset)
        first = signal.SIGRTMIN
        out, _ = program.communicate()
    assert out.split() == [str(first + offset) for offset in (5, 5, 5, 9)]


@pytest.mark.parametrize("namespaces", ["pid,net,mount", "net"])
def test_what_the_command_sends_to_its_group_does_not_come_back(
    words: tuple[str, ...], namespaces: str
) -> None:
    script = "n=0; trap 'n=$((n+1))' TERM; kill -TERM 0; sleep 0.3; echo $n"
    words = (*words, "--namespaces", namespaces, "--", "sh", "-c", script)
    with running(*words, start_new_session=True) as program:
        out, _ = program.communicate()
        assert (program.returncode, out) == (0, "1\n")


def test_signal_without_a_sender_is_passed_on_while_the_command_loses_a_process() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    assert not _is_from_within(0, gone, None)


def test_what_the_command_closes_is_closed(words: tuple[str, ...], tmp_path: Path) -> None:
    """`run` holds no end of a pipe that is the command's."""
    theirs, ours = (Descriptor(fd) for fd in os.pipe())
    with theirs, ours:
        script = f"exec <&- >&- {ours.fileno()}>&-; until [ -e {tmp_path}/go ]; do sleep 0.01; done"
        # bash: in others only the numbers below 10 can be closed.
        with running(*words, *ALL, "--", "bash", "-c", script, pass_fds=[ours.fileno()]) as program:
            ours.close()
            assert program.stdout is not None
            assert program.stdout.read() == ""
            assert os.read(theirs.fileno(), 1) == b""
            assert program.stdin is not None
            poll = select.poll()
            poll.register(program.stdin, 0)
            assert poll.poll(DEADLINE_S * 1000) == [(program.stdin.fileno(), select.POLLERR)]
            assert program.poll() is None
            (tmp_path / "go").touch()
            assert program.wait(DEADLINE_S) == 0


def test_record_locks_are_held_as_long_as_the_command_runs(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    program = (
        "import fcntl, os, sys\n"
        "file = os.open('lock', os.O_RDWR | os.O_CREAT)\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "os.set_inheritable(file, True)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = (sys.executable, "-c", program, INSTALLED)
    script = ("--", "sh", "-c", "echo ready; read line")
    with running(*words, *ALL, *script, command=command, cwd=tmp_path) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        with (tmp_path / "lock").open("w") as file:
            with pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            run.communicate("\n")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_closed_inside(
    words: tuple[str, ...], tmp_path: Path, closed: str
) -> None:
    found = []
    probe = (sys.executable, "-I", "-S", str(exec_probe.__file__), "9")
    for launcher in (("/usr/bin/env",), (INSTALLED, *words, *ALL, "--")):
        shell = ("sh", "-c", f'exec "$@" 9>"$0" {closed}', str(tmp_path / "result"))
        run = subprocess.run([*shell, *launcher, *probe], env=environment(), check=False)
        assert run.returncode == 0
        found.append(json.loads((tmp_path / "result").read_text())["descriptors"])
    assert found[0] == found[1]


@pytest.mark.clause("RUN-3")
def test_directory_of_another_mount_namespace_is_refused(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    """A consumer with a private directory, in a path that the node has as well."""
    (tmp_path / "input").write_text("of another job")
    private = 'mount -t tmpfs private . && cd "$PWD" && echo own >input && exec "$@"'
    where = {
        "command": ("unshare", "--mount", "sh", "-c", private, "sh", *COMMAND),
        "cwd": tmp_path,
    }
    with running(*words, "--namespaces", "mount", "--", "cat", "input", **where) as run:
        out, errors = run.communicate()
    assert (run.returncode, out) == (ExitCode.RUN_FAILED, "")
    assert f"the working directory is another one inside the allocation: {tmp_path}" in errors
    with running(*words, "--namespaces", "net", "--", "cat", "input", **where) as run:
        assert run.communicate() == ("own\n", "")


@pytest.mark.clause("RUN-3")
def test_directory_that_is_absent_inside_is_not_blamed_on_the_command(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    private = 'mount -t tmpfs none . && mkdir "$PWD/new" && cd "$PWD/new" && exec "$@"'
    with running(
        *(*words, "--namespaces", "mount", "--", "true"),
        command=("unshare", "--mount", "sh", "-c", private, "sh", *COMMAND),
        cwd=tmp_path,
    ) as run:
        out, errors = run.communicate()
    assert (run.returncode, out) == (ExitCode.RUN_FAILED, "")
    assert f"the working directory is absent inside the allocation: {tmp_path}/new" in errors


@pytest.mark.clause("DAEMON-8")
def test_memory_that_suffices_for_no_thread_is_named(words: tuple[str, ...]) -> None:
    limited = {"command": ("prlimit", "--data=268435456", "--stack=1073741824", *COMMAND)}
    with running(*words, "--namespaces", "net", "--", "true", **limited) as run:
        errors = run.communicate()[1]
    assert run.returncode == ExitCode.RUN_FAILED
    assert "no memory for its stack: raise RLIMIT_NPROC, RLIMIT_DATA" in errors


def test_silence_of_the_helper_is_no_exit_code_of_a_command(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "silent.py").write_text("")
    monkeypatch.setattr(forge_spawn, "_PROGRAM", tmp_path / "silent.py")
    assert cli.main([*words, *ALL, "--", "true"]) == ExitCode.RUN_FAILED
    assert "the helper that starts the command died" in capfd.readouterr().err


def test_what_was_made_is_ended_if_it_cannot_be_claimed(
    daemon: Daemon,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        assert cli.main([*words, *ALL, "--", "echo", "never"]) == ExitCode.RUN_FAILED
    out, errors = capfd.readouterr()
    assert (out, "No locks available" in errors) == ("", True)
    assert daemon.alive() == []


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


@pytest.mark.clause("RUN-6")
def test_interruption_does_not_end_what_was_there_before(
    tmp_path: Path, allocation_id: str, cgroup2: Path
) -> None:
    path = tmp_path / "silent.sock"
    words = ("run", "--socket", path, "--id", allocation_id, "--fallback", "never")
    scope = Scope.create(cgroup2, allocation_id, "the provider")
    try:
        with (
            endpoint.listen(path) as listener,
            running(*words, *ALL, "--", "echo", "never") as program,
            closing(next_of(listener)) as first,
        ):
            assert isinstance(next_message(first), NamespaceRequest)
            program.send_signal(signal.SIGTERM)
            assert program.wait(DEADLINE_S) == -signal.SIGTERM
            assert listener.accept() is None
            assert not any(isinstance(each, Delivery) for each in first.channel.receive())
    finally:
        wait_until(scope.remove)
        remove_slices(cgroup2)


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
        ("", ExitCode.NOT_FOUND, "No such file"),
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
    said = f"nshandoff: {command or repr('')}: {says}"
    assert result.stderr.startswith(said)
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
    daemon.wait_until_none_is_alive()


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


@pytest.mark.clause("SELF-16")
def test_on_a_node_without_a_provider_none_is_asked_and_nothing_is_said(
    daemon: Daemon, words: tuple[str, ...], allocation_id: str
) -> None:
    where = ("--fallback", "always", "--id", allocation_id)
    result = nshandoff(*words, *where, *ALL, "--", "sh", "-c", "echo $$; exit 5")
    assert (result.returncode, result.stdout, result.stderr) == (5, "2\n", "")
    assert daemon.events(allocation_id) == []


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

    def answer(self, *then: str) -> None:
        """Type a line, and see that it is read, what else is shown, and a good end."""
        self.type("typed\n")
        for shown in ("line typed", *then):
            self.wait_for(shown)
        assert self.program.wait(DEADLINE_S) == 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.leader.close()  # hangs up on the processes that are left
        self.slave.close()
        self.program.wait(DEADLINE_S)


def typed(words: tuple[str, ...], inside: str, namespaces: str = "pid") -> str:
    """The command line, for a shell."""
    return f"{' '.join((*COMMAND, *words))} --namespaces {namespaces} -- {inside}"


def test_command_has_the_terminal_and_it_comes_back(words: tuple[str, ...]) -> None:
    show = "import os; print('foreground', os.tcgetpgrp(0) == os.getpgrp(), flush=True)"
    inside = f"{sys.executable} -I -S -c \"{show}; print('line', input())\""
    after = f'{sys.executable} -I -S -c "{show}"'
    script = f"{typed(words, inside)}; {after}"
    with Terminal("sh", "-c", script) as terminal:
        assert terminal.wait_for(r"foreground (\w+)")[1] == "True"
        terminal.type("typed\n")
        terminal.wait_for("line typed")
        assert terminal.wait_for(r"foreground (\w+)")[1] == "True"
        assert terminal.program.wait(DEADLINE_S) == 0


def test_ctrl_c_is_the_commands(daemon: Daemon, words: tuple[str, ...]) -> None:
    # exec: a shell that is just starting a child may keep a Ctrl-C to itself.
    inside = ("sh", "-c", "echo ready; exec sleep 1000")
    with Terminal(*COMMAND, *words, "--namespaces", "pid", "--", *inside) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x03")
        assert terminal.program.wait(DEADLINE_S) == -signal.SIGINT
        assert daemon.alive() == []


@pytest.mark.clause("RUN-4")
def test_ctrl_c_comes_once(words: tuple[str, ...]) -> None:
    script = (
        "import os, signal, time\n"  # not print(): a handler may not come back into it
        "signal.signal(signal.SIGINT, lambda *_: os.write(1, b'INT '))\n"
        "os.write(1, b'ready ')\n"
        "for _ in range(50): time.sleep(0.01)\n"
        "print('over')"
    )
    inside = (sys.executable, "-I", "-S", "-c", script)
    with Terminal(*COMMAND, *words, "--namespaces", "pid", "--", *inside) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x03")
        shown = terminal.wait_for("(?s)(.*)over")[1]
        assert shown.count("INT") == 1
        assert terminal.program.wait(DEADLINE_S) == 0


def test_ctrl_z_stops_both_and_fg_continues_both(words: tuple[str, ...]) -> None:
    inside = "sh -c 'echo ready; read line; echo line $line; exit 6'"
    script = f"{typed(words, inside, 'pid,net')}; echo stopped $?; jobs; fg; echo exited $?"
    with Terminal("bash", "-mc", script) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x1a")
        terminal.wait_for(f"stopped {128 + signal.SIGTSTP}")
        terminal.answer("exited 6")


def test_ctrl_z_is_nothing_where_no_shell_could_continue(words: tuple[str, ...]) -> None:
    inside = ("sh", "-c", "echo ready; read line; echo line $line")
    with Terminal(*COMMAND, *words, "--namespaces", "pid", "--", *inside) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x1a")
        terminal.answer()


def test_rest_of_a_pipeline_keeps_the_terminal(words: tuple[str, ...]) -> None:
    job = typed(words, "sh -c 'echo ready; sleep 0.3'")
    rest = "sh -c 'cat; read line </dev/tty; echo line $line'"
    with Terminal("bash", "-mc", f"{job} | {rest}") as terminal:
        terminal.wait_for("ready")
        terminal.answer()


def test_terminal_is_the_commands_whatever_its_standard_input_is(words: tuple[str, ...]) -> None:
    inside = "sh -c 'echo ready; read line </dev/tty; echo line $line'"
    with Terminal("bash", "-mc", f"{typed(words, inside)} </dev/null") as terminal:
        terminal.wait_for("ready")
        terminal.answer()


def test_job_from_the_background_waits_for_the_foreground(words: tuple[str, ...]) -> None:
    inside = "sh -c 'echo ready; read line; echo line $line; exit 6'"
    job = typed(words, inside, "pid,net")
    wait = "until jobs | grep -q Stopped; do sleep 0.05; done"
    with Terminal("bash", "-mc", f"{job} & {wait}; echo stopped; fg; echo exited $?") as terminal:
        terminal.wait_for("stopped")
        terminal.answer("exited 6")


def test_without_a_terminal_nothing_is_different(words: tuple[str, ...]) -> None:
    inside = ("sh", "-c", "cat; tty; echo exited")
    with running(*words, "--namespaces", "pid", "--", *inside, start_new_session=True) as program:
        out, _ = program.communicate("typed\n")
    assert out == "typed\nnot a tty\nexited\n"


@pytest.mark.parametrize("leads", [True, False], ids=["leads its session", "of a shell"])
def test_terminal_that_is_taken_away_hangs_up_on_the_command(
    words: tuple[str, ...], tmp_path: Path, leads: bool
) -> None:
    inside = (
        f"trap 'echo HUP >{tmp_path}/hung; exit 0' HUP; echo ready; while :; do sleep 0.01; done"
    )
    command: tuple[str, ...] = (*COMMAND, *words, "--namespaces", "pid", "--", "sh", "-c", inside)
    if not leads:
        command = ("bash", "-ic", '"$@"; exit 0', "bash", *command)
    with Terminal(*command) as terminal:
        terminal.wait_for("ready")
    wait_until((tmp_path / "hung").exists)


def test_terminal_comes_back_from_a_shell_in_a_pid_namespace(words: tuple[str, ...]) -> None:
    show = "import os; print('foreground', os.tcgetpgrp(0) == os.getpgrp(), flush=True)"
    after = f'{sys.executable} -I -S -c "{show}"'
    shell = "bash --norc --noprofile -i"
    script = f"{typed(words, shell)}; {after}"
    with Terminal("sh", "-c", script) as terminal:
        terminal.wait_for("# ")
        terminal.type("sh -c 'echo started; exec sleep 1000'\n")
        terminal.wait_for(r"\rstarted")
        terminal.type("\x1a")
        terminal.wait_for("Stopped")
        terminal.type("kill %1; exit\nexit\n")
        assert terminal.wait_for(r"foreground (\w+)")[1] == "True"
        assert terminal.program.wait(DEADLINE_S) == 0


def test_end_by_a_signal_ends_a_script_as_it_would_without_run(words: tuple[str, ...]) -> None:
    """A shell goes on with the next line if what it waited for was not ended by the Ctrl-C."""
    inside = "sh -c 'echo ready; exec sleep 1000'"
    script = f"{typed(words, inside)}; echo next"
    with Terminal("bash", "-c", script) as terminal:
        terminal.wait_for("ready")
        terminal.type("\x03")
        assert terminal.program.wait(DEADLINE_S) == -signal.SIGINT
