"""What a workload and a stranger try against a provider: chapter 18's table, tried on this node.

Each attempt is a Python program in an allocation of its own kind, as root or as an ordinary user,
or outside of all allocations as a user whom the provider does not serve. What comes of it is an
errno, `can`, or `in vain`: the call succeeds and nothing happens. After each attempt every
allocation is alive, and the node's mounts are what they were.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from linux.anchor import ANCHOR_VARIABLE, AnchorIdentity, find_tokens
from linux.cgroups import ANCHOR_SLICE, DEFAULT_PLACE, OWNER_ATTRIBUTE, Scope, anchor_path
from linux.forge.spawn import Child, spawn_within
from linux.instance import instance_of
from linux.journal import JOURNAL_NAME, LOCK_NAME, read_journal
from linux.mounts import loop_devices
from linux.testing.worlds import SCOPE_PREFIX
from statemachine.messages import NamespaceType
from tests.support.forging import process_state
from tests.support.programs import (
    COMMAND,
    DEADLINE_S,
    MOUNT,
    NET,
    PID,
    ROOT,
    Daemon,
    nshandoff,
    wait_until,
)
from transport.request import Handoff

pytestmark = pytest.mark.needs_root

USER: Final = 65_534
INSIDE: Final = (PID, NET, MOUNT)
BESIDE: Final = (NET, MOUNT)
"""Without a PID namespace a workload sees the node's processes."""

CAN: Final = "can"
IN_VAIN: Final = "in vain"
NOT_TRIED: Final = "—"

PROGRAM: Final = """
import ctypes, errno, fcntl, json, os, signal, socket, subprocess, sys
here, uid = json.loads(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def lock(path, flags=os.O_RDONLY):
    fcntl.flock(os.open(path, flags), fcntl.LOCK_EX | fcntl.LOCK_NB)
def write(path, text):
    os.write(os.open(path, os.O_WRONLY), text)
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
try:
    exec(sys.argv[3])
    print("can")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


class Attempt(NamedTuple):
    """A program, where it runs, and what comes of it."""

    program: str
    user: str
    root: str
    stranger: str = NOT_TRIED
    kinds: tuple[NamespaceType, ...] = INSIDE


ATTEMPTS: Final[Mapping[str, Attempt]] = {
    # The provider.
    "connect to the provider": Attempt(
        "socket.socket(socket.AF_UNIX).connect(here['socket'])", "EACCES", CAN, "EACCES"
    ),
    "put a socket in the place of the provider's": Attempt(
        "path = here['socket'] + '.new'; socket.socket(socket.AF_UNIX).bind(path); os.unlink(path)",
        "EACCES",
        CAN,
        "EACCES",
    ),
    "open the journal": Attempt("open(here['journal'], 'r+b')", "EACCES", CAN, "EACCES"),
    "keep the journal from being written, by a lock": Attempt(
        "file = os.open(here['journal'] + '-shm', os.O_RDONLY); fcntl.lockf(file, 5, 1, 120)",
        "EACCES",
        CAN,
        "EACCES",
    ),
    "lock the state directory": Attempt("lock(here['lock'])", "EACCES", "EAGAIN", "EACCES"),
    "lock the anchors' cgroup": Attempt("lock(here['anchors'])", "EACCES", "EAGAIN", "EACCES"),
    "send the provider a signal": Attempt(
        "os.kill(here['provider'], 0)", "EPERM", CAN, "EPERM", BESIDE
    ),
    "open the provider's namespaces": Attempt(
        "os.open(f'/proc/{here[\"provider\"]}/ns/mnt', os.O_RDONLY)",
        "EACCES",
        CAN,
        "EACCES",
        BESIDE,
    ),
    "write the provider's memory": Attempt(
        "os.open(f'/proc/{here[\"provider\"]}/mem', os.O_RDWR)", "EACCES", CAN, "EACCES", BESIDE
    ),
    "take a descriptor of the provider": Attempt(
        "call('syscall', 438, os.pidfd_open(here['provider']), 0, 0)", "EPERM", CAN, "EPERM", BESIDE
    ),
    # Anchors and inits.
    "send an anchor a signal": Attempt("os.kill(here['anchor'], 0)", "EPERM", CAN, "EPERM", BESIDE),
    "trace an anchor": Attempt(
        "call('ptrace', 0x4206, here['anchor'], 0, 0)", "EPERM", CAN, "EPERM", BESIDE
    ),
    "open an anchor's namespaces": Attempt(
        "os.open(f'/proc/{here[\"anchor\"]}/ns/net', os.O_RDONLY)", "EACCES", CAN, "EACCES", BESIDE
    ),
    "read an anchor's environment": Attempt(
        "open(f'/proc/{here[\"anchor\"]}/environ').read()", "EACCES", CAN, "EACCES", BESIDE
    ),
    "kill its init": Attempt("os.kill(1, signal.SIGKILL)", "EPERM", IN_VAIN),
    "trace its init": Attempt("call('ptrace', 0x4206, 1, 0, 0)", "EPERM", CAN),
    # Mounts.
    "unmount /proc": Attempt("call('umount2', b'/proc', 2)", "EPERM", CAN),
    "unmount /proc in a user namespace of its own": Attempt(
        "call('unshare', 0x10020000); call('umount2', b'/proc', 2)", "EINVAL", "EINVAL"
    ),
    "see the provider in /proc": Attempt("os.stat(f'/proc/{here[\"provider\"]}')", *["ENOENT"] * 2),
    "see the provider in a new /proc": Attempt(
        "call('mount', b'proc', b'/proc', b'proc', 0, 0); os.stat(f'/proc/{here[\"provider\"]}')",
        "EPERM",
        "ENOENT",
    ),
    "mount something that the node sees": Attempt(
        "call('mount', b'nsh', here['directory'].encode(), b'tmpfs', 0, 0)", "EPERM", IN_VAIN
    ),
    "write into the image": Attempt("open(here['mount'] + '/hello.txt', 'r+b')", "EROFS", "EROFS"),
    "write into the image, mounted anew": Attempt(
        "call('mount', 0, here['mount'].encode(), 0, 4128, 0)\n"
        "open(here['mount'] + '/hello.txt', 'r+b')",
        "EPERM",
        "EROFS",
    ),
    "write to the image's file": Attempt("open(here['image'], 'r+b')", "EACCES", CAN, "EACCES"),
    "write to the image's loop device": Attempt(
        "fd = os.open(here['loop'], os.O_RDWR); os.pwrite(fd, os.pread(fd, 512, 0), 0)",
        "EACCES",
        "EPERM",
        "EACCES",
    ),
    "become root by a program of the image": Attempt(
        "program = os.path.join(here['mount'], 'id')\n"
        "if subprocess.check_output([program, '-u']) != b'0\\n': raise OSError(errno.EPERM, 'id')",
        "EPERM",
        NOT_TRIED,
    ),
    "open a device of the image": Attempt(
        "os.open(os.path.join(here['mount'], 'zero'), os.O_RDONLY)", "EACCES", "EACCES"
    ),
    # Cgroups.
    "leave its scope": Attempt("write(here['top'] + '/cgroup.procs', b'0')", "EACCES", CAN),
    "enter another's scope": Attempt(
        "write(here['other'] + '/cgroup.procs', b'0')", "EACCES", CAN, "EACCES"
    ),
    "kill what is in its scope": Attempt(
        "os.open(here['scope'] + '/cgroup.kill', os.O_WRONLY)", "EACCES", CAN, "EACCES"
    ),
    "kill every anchor": Attempt(
        "os.open(here['slice'] + '/cgroup.kill', os.O_WRONLY)", "EACCES", CAN, "EACCES"
    ),
    "freeze another's scope": Attempt(
        "os.open(here['other'] + '/cgroup.freeze', os.O_WRONLY)", "EACCES", CAN, "EACCES"
    ),
    "remove another's scope": Attempt("os.rmdir(here['other'])", "EACCES", "EBUSY", "EACCES"),
    "make a scope for another": Attempt(
        "os.mkdir(here['next']); os.rmdir(here['next'])", "EACCES", CAN, "EACCES"
    ),
    "change the owner of its scope": Attempt(
        # To the same one: another would be seen by the provider, which ends the allocation.
        "name = here['attribute']\n"
        "os.setxattr(here['scope'], name, os.getxattr(here['scope'], name))",
        "EPERM",
        CAN,
        "EPERM",
    ),
    "lock its scope before run does": Attempt(
        "lock(here['scope'] + '/cgroup.kill', os.O_WRONLY)", "EACCES", CAN, "EACCES"
    ),
}
"""The rows of chapter 18."""


class SharedNode:
    """A daemon whose places can be reached by every user, and an allocation that is alive."""

    def __init__(self, daemon: Daemon, cgroup2: Path, image: Path, stack: ExitStack) -> None:
        self.daemon: Final = daemon
        self.cgroup2: Final = cgroup2
        self._image: Final = image
        self._stack: Final = stack
        self._count: Final = itertools.count(1)
        self.victim: Final = stack.enter_context(self.obtain(*INSIDE))
        self.start(self.victim, "sleep", "infinity")
        mount = self.victim.response.uenv_mount_path
        assert mount is not None
        name = self.victim.request.allocation_id
        self._places: Final[Mapping[str, Any]] = {
            "socket": daemon.socket,
            "journal": daemon.state_dir / JOURNAL_NAME,
            "lock": daemon.state_dir / LOCK_NAME,
            "anchors": anchor_path(cgroup2, instance_of(daemon.state_dir)),
            "slice": cgroup2 / ANCHOR_SLICE,
            "provider": daemon.pid,
            "anchor": self.anchor_of(name),
            "directory": daemon.socket.parent,
            "mount": mount,
            "image": image,
            "loop": next(device for device, file in loop_devices() if file == str(image)),
            "top": cgroup2,
            "scope": self.scope_of(name),
            "other": self.scope_of(name),
            "next": self.scope_of(f"{SCOPE_PREFIX}threat-next"),
            "attribute": OWNER_ATTRIBUTE,
        }

    def obtain(self, *kinds: NamespaceType) -> Handoff:
        name = f"{SCOPE_PREFIX}threat-{next(self._count)}"
        return self.daemon.obtain(name, *kinds, image=self._image.name if MOUNT in kinds else None)

    def start(self, handoff: Handoff, *command: str, **more: int) -> Child:
        """Start a command in an allocation; it is killed and waited for in the end."""
        with Scope(self.scope_of(handoff.request.allocation_id), "").open_procs() as procs:
            child = spawn_within(command, handoff.bundle, scope=procs, **more)
        self._stack.callback(_end, child)
        return child

    def scope_of(self, name: str) -> Path:
        return DEFAULT_PLACE.path_of(self.cgroup2, name)

    def anchor_of(self, name: str) -> int:
        entries = read_journal(self.daemon.state_dir).entries
        (anchor,) = (entry.anchor for entry in entries if entry.allocation_id == name)
        assert anchor is not None
        return AnchorIdentity.from_json(anchor).pid

    def words(self, program: str, uid: int, scope: Path) -> tuple[str, ...]:
        # Not the interpreter of the environment, which another user may not reach.
        python = os.path.realpath(sys.executable)
        places = json.dumps({**self._places, "scope": scope}, default=str)
        return (python, "-I", "-S", "-B", "-c", PROGRAM, places, str(uid), program)

    def comes_of(self, attempt: Attempt, who: str) -> str:
        """Have it tried: in an allocation of its own, or by a stranger outside of all."""
        if who == "stranger":
            words = self.words(attempt.program, USER, self._places["scope"])
            with subprocess.Popen(words, stdout=subprocess.PIPE, cwd="/") as child:
                said, _ = child.communicate(timeout=DEADLINE_S)
            return said.decode().strip()
        with self.obtain(*attempt.kinds) as handoff:
            # What leaves its scope must not be what ends the allocation.
            self.start(handoff, "sh", "-c", "sleep infinity &").wait(DEADLINE_S)
            scope = self.scope_of(handoff.request.allocation_id)
            words = self.words(attempt.program, 0 if who == "root" else USER, scope)
            tries = self.start(handoff, *words, stdout=subprocess.PIPE)
            said, _ = tries.communicate(timeout=DEADLINE_S)
            assert handoff.end(DEADLINE_S)
        return said.decode().strip()

    def standing(self) -> object:
        """What no attempt may change: allocations, their inits, the node's mounts."""
        states = self.daemon.states()
        inits = {name: process_state(self.anchor_of(name)) for name in states}
        return states, inits, Path("/proc/self/mountinfo").read_text()


def _end(child: Child) -> None:
    child.kill()
    with child:
        pass


def make_tempting_image(image: Path) -> Path:
    """An image with a setuid program and a device of root's, as another builder could make."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        (tree / "hello.txt").write_text("hello\n")
        (tree / "hello.txt").chmod(0o666)
        (tree / "id").write_bytes(Path("/usr/bin/id").read_bytes())
        (tree / "id").chmod(0o4755)
        os.mknod(tree / "zero", 0o020666, os.makedev(1, 5))
        (tree / "zero").chmod(0o666)
        tree.chmod(0o755)
        subprocess.run(
            ["mksquashfs", tree, image, "-noappend", "-no-progress", "-quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return image


@pytest.fixture(scope="module")
def node(cgroup2: Path) -> Iterator[SharedNode]:
    # Below pytest's own directories no other user could reach anything.
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory, images = Path(folder), Path(folder) / "images"
        directory.chmod(0o755)
        images.mkdir()
        daemon = Daemon(directory, images)
        # As systemd makes one (StateDirectory=), so that the files have to defend themselves.
        daemon.state_dir.mkdir(mode=0o755)
        image = make_tempting_image(images / "tempting.sqfs")
        daemon.start()
        try:
            with stack:
                yield SharedNode(daemon, cgroup2, image, stack)
        finally:
            daemon.clear()
            daemon.stop()


TRIED: Final = [
    (name, who)
    for name, attempt in ATTEMPTS.items()
    for who in ("user", "root", "stranger")
    if getattr(attempt, who) != NOT_TRIED
]


@pytest.mark.sample(2)
@pytest.mark.clause("PEER-18")
@pytest.mark.parametrize(("name", "who"), TRIED)
def test_what_is_tried_comes_to_what_the_chapter_says(
    node: SharedNode, name: str, who: str
) -> None:
    attempt, before = ATTEMPTS[name], node.standing()
    expected = getattr(attempt, who)
    assert node.comes_of(attempt, who) == (CAN if expected == IN_VAIN else expected)
    assert node.standing() == before


# --- What is right -------------------------------------------------------------------------------


@pytest.mark.clause("PEER-19")
def test_a_launcher_in_an_allocation_may_have_another_one(
    node: SharedNode, allocation_id: str
) -> None:
    places = ("--socket", str(node.daemon.socket), "--id", allocation_id, "--fallback", "never")
    words = ("run", "--namespaces", "net,mount", *places, "--", "echo", "nested")
    with node.obtain(*BESIDE) as handoff:
        command = ("env", f"PYTHONPATH={ROOT}", *COMMAND, *words)
        with node.start(handoff, *command, stdout=subprocess.PIPE) as launcher:
            said, _ = launcher.communicate(timeout=DEADLINE_S)
        assert handoff.end(DEADLINE_S)
    assert (launcher.returncode, said) == (0, b"nested\n")


# --- What a workload leaves behind ---------------------------------------------------------------

LEAVES: Final = """
if os.fork():
    os.wait()
    os._exit(0)
os.setsid()
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)
{before}
os.close(1)
signal.pause()
"""
"""Starts a process that has a session and a parent of its own, and is not waited for."""

LEAVING: Final = "write(here['top'] + '/cgroup.procs', b'0')"


def left_behind(
    node: SharedNode, kinds: tuple[NamespaceType, ...], uid: int, before: str = ""
) -> Path:
    """End an allocation in which a process was left; where the process is, or was, in /proc."""
    with node.obtain(*kinds) as handoff:
        # What leaves its scope must not be what ends the allocation.
        node.start(handoff, "sh", "-c", "sleep infinity &").wait(DEADLINE_S)
        scope = node.scope_of(handoff.request.allocation_id)
        words = node.words(LEAVES.format(before=before), uid, scope)
        with node.start(handoff, *words, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            inner = int(child.stdout.read())
        place = place_of(inner, words)
        assert handoff.end(DEADLINE_S)
    return place


def is_over(place: Path) -> bool:
    return process_state(int(place.name)) in ("", "Z", "X")


def place_of(inner: int, words: tuple[str, ...]) -> Path:
    """Where in the node's /proc a process is, of which its own PID namespace says the number."""
    command = "\0".join(words).encode() + b"\0"
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and (path / "cmdline").read_bytes() == command:
                line = re.search(r"^NSpid:.*\t(\d+)$", (path / "status").read_text(), re.MULTILINE)
                if line and int(line[1]) == inner:
                    return path
    raise AssertionError(f"no process is number {inner}")


@pytest.mark.clause("END-8")
@pytest.mark.parametrize("uid", [0, USER])
@pytest.mark.parametrize("kinds", [INSIDE, BESIDE], ids=["with a PID namespace", "without"])
def test_a_process_without_parent_and_session_ends_with_its_allocation(
    node: SharedNode, kinds: tuple[NamespaceType, ...], uid: int
) -> None:
    assert is_over(left_behind(node, kinds, uid))


@pytest.mark.clause("END-8")
def test_root_that_has_left_its_scope_ends_with_its_pid_namespace(node: SharedNode) -> None:
    assert is_over(left_behind(node, INSIDE, 0, LEAVING))


def test_root_that_has_left_its_scope_outlives_its_allocation_without_a_pid_namespace(
    node: SharedNode,
) -> None:
    place = left_behind(node, BESIDE, 0, LEAVING)
    assert not is_over(place)
    pidfd = os.pidfd_open(int(place.name))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    wait_until(lambda: is_over(place))


# --- Locks ---------------------------------------------------------------------------------------


@pytest.mark.clause("PEER-18", "RUN-7")
def test_a_user_who_locks_all_that_can_be_opened_of_a_scope_does_not_mislead_run(
    node: SharedNode, allocation_id: str
) -> None:
    scope = node.scope_of(allocation_id)
    scope.mkdir()
    locking = (
        "for name in ['.', *os.listdir(here['scope'])]:\n"
        "    try: lock(os.path.join(here['scope'], name))\n"
        "    except OSError: pass\n"
        "print('locked', flush=True); signal.pause()"
    )
    try:
        with subprocess.Popen(
            node.words(locking, USER, scope), stdout=subprocess.PIPE, cwd="/"
        ) as stranger:
            try:
                assert stranger.stdout is not None
                assert stranger.stdout.readline() == b"locked\n"
                places = ("--socket", node.daemon.socket, "--id", allocation_id)
                command = ("sh", "-c", "setsid sleep infinity >/dev/null 2>&1 &")
                ran = nshandoff("run", "--namespaces", "net", *places, "--", *command)
                assert (ran.returncode, ran.stderr) == (0, "")
                # The one that made it ends it, though a process is left in it.
                assert allocation_id not in node.daemon.states()
            finally:
                stranger.kill()
    finally:
        scope.rmdir()


def test_a_user_can_pretend_to_be_an_anchor_that_was_lost(node: SharedNode) -> None:
    """It only keeps what has ended from being released, until that user's process ends."""
    token = os.getxattr(node.scope_of(node.victim.request.allocation_id), OWNER_ATTRIBUTE).decode()
    with subprocess.Popen(
        ["setpriv", f"--reuid={USER}", "--clear-groups", "sleep", "infinity"],
        env={ANCHOR_VARIABLE: token},
    ) as pretender:
        try:
            wait_until(lambda: token in find_tokens({token}))
        finally:
            pretender.kill()


# --- The chapter ---------------------------------------------------------------------------------

CHAPTER: Final = ROOT / "specs" / "18-threats.md"


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    below = CHAPTER.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    _, _, *rows = below[below.index("\n|") : below.index("|\n\n")].strip().splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_chapter_has_every_attempt_and_what_came_of_it() -> None:
    tried = [[name, each.user, each.root, each.stranger] for name, each in ATTEMPTS.items()]
    assert rows_of("What was tried") == tried


def test_every_test_that_the_chapter_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", CHAPTER.read_text(encoding="utf-8")))
    there = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 10
    assert named - there == set()
