"""The provider as a program: ready when it says so, and what is alive survives its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from linux.cli.exits import ExitCode
from linux.cli.log import JsonLines
from linux.cli.ready_socket import READY_WAITING_MAX, ReadySocket
from linux.consumer import wait_ready
from linux.journal import JOURNAL_NAME
from linux.mounts import loop_devices
from statemachine import CreationFailed, NamespaceRequest, SocketUnavailable
from tests.conftest import MakeImage
from tests.support.programs import (
    MOUNT,
    NET,
    PID,
    Daemon,
    daemon_in,
    identities_of,
    nshandoff,
    running,
    wait_until,
)
from transport.codec import decode_message, encode_message
from transport.framing import FrameReader, encode_frame
from transport.testing.peer import DEADLINE_S

pytestmark = pytest.mark.needs_root

NOBODY = 65534


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_basic_it_says_when_it_is_ready_and_stops_clean(
    tmp_path: Path, image_root: Path, number: signal.Signals
) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.state_dir.mkdir()
    daemon.ready.write_text('{"pid": 1, "socket": "of a provider that was killed"}')
    daemon.start()
    assert json.loads(daemon.ready.read_text()) == {
        "pid": daemon.pid,
        "socket": str(daemon.socket),
    }
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    assert daemon.stop(number) == ExitCode.OK
    assert not daemon.ready.exists()
    assert not daemon.socket.exists()
    events = [line["event"] for line in daemon.events()]
    assert (events[0], events[-1]) == ("starting", "stopped")
    assert {"ready", "stopping"} < set(events)


@pytest.mark.clause("DAEMON-12")
def test_readiness_is_shown_beside_the_socket_or_where_it_is_wanted(
    tmp_path: Path, image_root: Path
) -> None:
    file, told = tmp_path / "elsewhere", tmp_path / "told.sock"
    daemon = Daemon(tmp_path, image_root)
    for options in ((), ("--ready-file", str(file), "--ready-socket", str(told))):
        daemon.options = options
        places = (file, told) if options else (tmp_path / "ready", tmp_path / "ready.sock")
        daemon.begin()
        wait_ready(places[1], DEADLINE_S)
        assert json.loads(places[0].read_text()) == json.loads(daemon.ready.read_text())
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(places[1]))
            with sock.makefile() as line:
                assert line.read() == places[0].read_text()
        assert stat.S_IMODE(places[1].stat().st_mode) == 0o600
        assert daemon.stop(signal.SIGKILL if options == () else signal.SIGTERM) in (0, -9)
    assert not any(place.exists() for place in (file, told))
    with pytest.raises(SocketUnavailable, match="does not exist"):
        wait_ready(told, 0.1)


@pytest.mark.clause("DAEMON-12")
def test_readiness_of_a_killed_provider_is_withdrawn_before_the_next_one_serves(
    tmp_path: Path, image_root: Path
) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.start()
    daemon.stop(signal.SIGKILL)
    assert daemon.ready.exists()
    daemon.socket.unlink()
    daemon.socket.mkdir()  # so that it cannot serve
    daemon.begin()
    wait_until(lambda: not daemon.is_running())
    assert not daemon.ready.exists()


@pytest.mark.clause("DAEMON-12")
def test_who_asks_before_it_is_ready_is_told_when_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ready.sock"

    async def play() -> list[bytes]:
        ready = ReadySocket(path, 0o600, None, "word\n")
        await ready.open()
        peers = [await asyncio.open_unix_connection(path) for _ in range(READY_WAITING_MAX + 1)]
        assert await peers[-1][0].read() == b""  # one too many
        waiting = [asyncio.create_task(reader.read()) for reader, _ in peers[:-1]]
        assert not (await asyncio.wait(waiting, timeout=0.05))[0]
        ready.announce()
        words = [await word for word in waiting]
        for _, writer in peers:
            writer.close()
        ready.close()
        return words

    assert asyncio.run(play()) == [b"word\n"] * READY_WAITING_MAX
    assert not path.exists()


@pytest.mark.parametrize("is_abstract", [False, True], ids=["path", "abstract"])
def test_systemd_is_notified(tmp_path: Path, image_root: Path, is_abstract: bool) -> None:
    name = f"@nshandoff-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(20)
        systemd.bind(f"\0{name[1:]}" if is_abstract else name)
        daemon = Daemon(tmp_path, image_root)
        daemon.start(NOTIFY_SOCKET=name)
        assert systemd.recv(100) == b"READY=1"
        assert daemon.stop() == ExitCode.OK
        assert systemd.recv(100) == b"STOPPING=1"


def test_it_runs_on_when_systemd_cannot_be_notified(tmp_path: Path, image_root: Path) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.start(NOTIFY_SOCKET=str(tmp_path / "absent"))
    assert daemon.stop() == ExitCode.OK
    assert "notify_failed" in {line["event"] for line in daemon.events()}


@pytest.mark.clause("CRASH-2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_one_hands_over_the_same_namespaces(
    daemon: Daemon, allocation_id: str, number: signal.Signals
) -> None:
    kinds = (NET, PID, MOUNT)
    with daemon.obtain(allocation_id, *kinds, image="hello.sqfs") as handoff:
        before = handoff.identities
    # It is handed off a moment before that is written down.
    wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
    daemon.stop(number)
    daemon.start()
    words = ("--id", allocation_id, "--namespaces", "net,pid,mount", "--uenv", "hello.sqfs")
    with running("request", *words, "--socket", daemon.socket, "--json", "--end") as program:
        assert program.stdout is not None
        shown = json.loads(program.stdout.readline())
        after = tuple(one["namespace_id"] for one in shown["descriptors"])
        assert after == tuple(identity.key[0] for identity in before)
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 0
    (adopted,) = (x for x in daemon.events(allocation_id) if x["event"] == "handed_off_adopted")
    assert (adopted["from"], adopted["to"]) == ("unknown", "handed_off")


def test_every_row_that_is_taken_is_logged(daemon: Daemon, allocation_id: str) -> None:
    command = ("run", "--socket", daemon.socket, "--id", allocation_id, "--namespaces", "pid")
    assert nshandoff(*command, "--", "true").returncode == 0
    daemon.wait_until_none_is_alive()
    assert daemon.moves(allocation_id) == [
        ("unknown", "requested"),
        ("requested", "created"),
        ("created", "handed_off"),
        ("handed_off", "ended"),
        ("ended", "released"),
    ]
    first = daemon.events(allocation_id)[0]
    assert (first["event"], first["level"]) == ("request_received", "info")
    assert (first["namespaces"], first["uenv_image"]) == (["Pid"], None)
    assert first["effects"] == ["create_namespaces"]
    assert all({"time", "level", "event"} <= line.keys() for line in daemon.events())


def test_an_exception_is_one_line_as_well() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", 40, __file__, 1, "it failed: %s", ("y",), sys.exc_info())
    (line,) = JsonLines().format(record).splitlines()
    told = json.loads(line)
    assert (told["level"], told["event"], told["message"]) == ("error", "x", "it failed: y")
    assert told["exception"].endswith("ValueError: two\nlines")


def test_unclaimed_allocation_ends(tmp_path: Path, image_root: Path, allocation_id: str) -> None:
    with daemon_in(tmp_path, image_root, "--claim-timeout", "0.05") as daemon:
        with daemon.obtain(allocation_id, PID):
            pass
        daemon.wait_until_none_is_alive()
        assert "claim_expired" in {line["event"] for line in daemon.events(allocation_id)}


@pytest.mark.clause("NODE-14")
def test_a_restart_drops_the_images_that_are_held_and_none_that_is_in_use(
    tmp_path: Path, make_image: MakeImage, allocation_id: str
) -> None:
    images = [make_image(tmp_path / "images" / f"{name}.sqfs", {name: name}) for name in "ab"]

    def held() -> set[str]:
        return {file for _, file in loop_devices()} & set(map(str, images))

    with (
        daemon_in(tmp_path, tmp_path / "images", "--hold-time", "1000") as daemon,
        daemon.obtain(allocation_id, MOUNT, image="b.sqfs"),
    ):
        with daemon.obtain(f"{allocation_id}-2", MOUNT, image="a.sqfs") as handoff:
            assert handoff.end(DEADLINE_S)
        assert held() == set(map(str, images))
        daemon.stop()
        daemon.start()
        wait_until(lambda: held() == {str(images[1])})
    wait_until(lambda: not held())


@pytest.mark.clause("PEER-4")
def test_limits_are_as_asked(tmp_path: Path, image_root: Path, allocation_id: str) -> None:
    limits = ("--max-allocations", "1", "--max-connections", "2")
    with daemon_in(tmp_path, image_root, *limits) as daemon, daemon.obtain(allocation_id, PID):
        with pytest.raises(CreationFailed, match="live allocations of one user, at most 1"):
            daemon.obtain(f"{allocation_id}-2", PID)
        wait_until(lambda: any(line["event"] == "connection_lost" for line in daemon.events()))
        with (
            daemon.obtain(allocation_id, PID),
            pytest.raises(CreationFailed, match="connections of one user, at most 2"),
        ):
            daemon.obtain(allocation_id, PID)


def test_permissions_are_as_asked(tmp_path: Path, image_root: Path) -> None:
    umask = os.umask(0o077)
    try:
        daemon = Daemon(tmp_path / "a" / "b", image_root, "--mode", "0660", "--group", str(NOBODY))
        daemon.log = tmp_path / "log"
        daemon.start()
    finally:
        os.umask(umask)
    status = daemon.socket.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, NOBODY)
    for made in (tmp_path / "a", tmp_path / "a" / "b", daemon.uenv_base):
        assert stat.S_IMODE(made.stat().st_mode) == 0o755
    assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700
    assert daemon.stop() == ExitCode.OK


@pytest.mark.parametrize("is_allowed", [False, True])
def test_other_users_are_served_if_allowed(image_root: Path, is_allowed: bool) -> None:
    """A request that breaks a rule shows by its refusal that it was looked at."""
    allowed = ("--allow-uid", str(NOBODY)) if is_allowed else ()
    request = encode_frame(encode_message(NamespaceRequest("..", ())))
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "try: s.sendall(bytes.fromhex(sys.argv[2]))\n"
        "except BrokenPipeError: pass  # turned away already\n"
        "print(s.recv(4096).hex())"
    )
    # Not below pytest's own directory, which only its user may enter.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        with daemon_in(Path(name), image_root, "--mode", "0666", *allowed) as daemon:
            asked = subprocess.run(
                ["/usr/bin/python3", "-I", "-S", "-c", program, daemon.socket, request.hex()],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                stdout=subprocess.PIPE,
                check=True,
            )
    reader = FrameReader()
    reader.feed(bytes.fromhex(asked.stdout.decode()))
    taken = reader.take()
    assert taken is not None
    kind = "CreationFailed" if is_allowed else "SocketUnavailable"
    assert type(decode_message(taken[0])).__name__ == kind


# --- What keeps it from starting ---------------------------------------------------------------


def failure(*words: str, within: Sequence[str | Path] = ()) -> tuple[str, str]:
    """Start one that cannot start; the kind of error and the text it says."""
    told = nshandoff(*words, within=within)
    assert told.returncode == ExitCode.ENVIRONMENT
    last = json.loads(told.stderr.splitlines()[-1])
    assert (last["event"], last["level"]) == ("start_failed", "error")
    return last["error"], last["message"]


@pytest.mark.clause("CRASH-10")
def test_second_one_on_a_socket_changes_nothing(
    daemon: Daemon, tmp_path: Path, image_root: Path
) -> None:
    second = Daemon(tmp_path / "second", image_root)
    second.socket = daemon.socket
    error, text = failure(*second.words)
    assert error == "SocketUnavailable"
    assert f"another process listens on {daemon.socket}" in text
    assert daemon.consumer() is not None
    assert daemon.ready.exists()


def test_second_one_on_a_state_directory_changes_nothing(
    daemon: Daemon, tmp_path: Path, image_root: Path
) -> None:
    second = Daemon(tmp_path / "second", image_root)
    second.state_dir = daemon.state_dir
    error, text = failure(*second.words)
    assert error == "JournalBusy"
    assert str(daemon.pid) in text
    assert json.loads(daemon.ready.read_text())["pid"] == daemon.pid
    assert not second.socket.exists()


@pytest.mark.clause("CRASH-11")
def test_damaged_journal_is_left_alone(tmp_path: Path, image_root: Path) -> None:
    daemon = Daemon(tmp_path, image_root)
    daemon.state_dir.mkdir()
    journal = daemon.state_dir / JOURNAL_NAME
    journal.write_bytes(b"not a database" * 100)
    error, text = failure(*daemon.words)
    assert (error, str(journal) in text) == ("JournalCorrupt", True)
    assert journal.read_bytes() == b"not a database" * 100


def test_node_without_cgroup2_is_named(tmp_path: Path, image_root: Path, cgroup2: Path) -> None:
    hide = 'umount --lazy "$0" && exec "$@"'
    within = ("unshare", "--mount", "sh", "-c", hide, cgroup2)
    error, text = failure(*Daemon(tmp_path, image_root).words, within=within)
    assert (error, "mount one" in text) == ("CgroupUnavailable", True)


def test_directory_that_cannot_be_made_is_named(tmp_path: Path, image_root: Path) -> None:
    (tmp_path / "file").write_text("")
    error, text = failure(*Daemon(tmp_path / "file" / "x", image_root).words)
    assert (error, str(tmp_path / "file") in text) == ("SyscallError", True)


# --- A simulated node --------------------------------------------------------------------------


def test_simulated_node_is_served_too(tmp_path: Path, image_root: Path, allocation_id: str) -> None:
    words = ("--id", allocation_id, "--namespaces", "pid,mount", "--uenv", "hello.sqfs")
    simulated = ("--backend", "simulated")
    with (
        daemon_in(tmp_path, image_root, *simulated) as daemon,
        running("request", *words, "--socket", daemon.socket, *simulated, "--json") as program,
    ):
        assert program.stdout is not None
        shown = json.loads(program.stdout.readline())
        assert set(identities_of(shown)) == {"Pid", "Mount"}
        assert shown["is_degraded"] is False
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 0


def test_work_that_hangs_does_not_keep_it_from_stopping(daemon: Daemon, allocation_id: str) -> None:
    with daemon.obtain(allocation_id, PID) as handoff:
        assert handoff.end()
    forge = forge_of(daemon)
    os.kill(forge, signal.SIGSTOP)
    try:
        words = ("--socket", daemon.socket, "--id", allocation_id, "--namespaces", "pid")
        with running("request", *words, "--fallback", "never") as program:
            wait_until(lambda: len(daemon.moves(allocation_id)) > 5)
            assert daemon.stop() == ExitCode.OK
            assert program.wait(20) == ExitCode.UNAVAILABLE
    finally:
        os.kill(forge, signal.SIGCONT)
    assert daemon.events()[-1]["event"] == "stopped"
    # The next provider finds what was half made, and undoes it.
    daemon.start()
    daemon.wait_until_none_is_alive()


def forge_of(daemon: Daemon) -> int:
    # Whichever thread started it is its parent.
    tasks = Path(f"/proc/{daemon.pid}/task").glob("*/children")
    children = [pid for task in tasks for pid in task.read_text().split()]
    (forge,) = [
        int(pid) for pid in children if b"forge" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return forge
