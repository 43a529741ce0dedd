"""On every kind of node a verb works, or is refused in words that say what would help; never half.

A node is made of a mount table, namespaces and rights of its own, and every verb is run within it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from linux.cgroups import remove_cgroup
from linux.cli.exits import ExitCode
from tests.support.census import kill_all
from tests.support.programs import ROOT, environment, wait_until

pytestmark = pytest.mark.needs_root

ExpectedOutcomes = Mapping[str, tuple[int, str]]
"""By verb: exit status, and a pattern of what it prints."""

SERVES: Final[ExpectedOutcomes] = {
    "serve": (0, r'"event": "ready"'),
    "request": (0, r"(?s)has ended.*0: provider .*handed_off.*0: ALIVE.*nothing needs attention"),
}
WORKS: Final[ExpectedOutcomes] = {
    **SERVES,
    "image": (0, r"^pid 2\nhello from the image\n$"),
    "alone": (0, r"pid 2\n"),
}
DEMONSTRATES: Final[ExpectedOutcomes] = {**WORKS, "demo": (0, r"37 checks, every one held")}
NO_IMAGE: Final = (
    r"/dev/loop-control; a loop device is missing: modprobe loop, and give a container"
)
WITHOUT_LOOP: Final[ExpectedOutcomes] = {
    **WORKS,
    "serve": (0, rf"no image can be mounted: open.2.: ENOENT .*{NO_IMAGE}"),
    "run": (0, r"^pid 2\n$"),
    "image": (125, rf"CreationFailed: .*{NO_IMAGE}"),
    "demo": (0, r"(?s)--  the image: .*/dev/loop-control.*31 checks, every one held"),
}


def refused(words: str) -> ExpectedOutcomes:
    """No provider starts; a consumer without one says that it cannot, either."""
    return {
        "serve": (ExitCode.ENVIRONMENT, rf'"event": "start_failed".*{words}'),
        "request": (ExitCode.UNAVAILABLE, r"(?s)handoff.sock does not exist"),
        "alone": (ExitCode.RUN_FAILED, rf"CreationFailed: .*{words}"),
        "demo": (ExitCode.ENVIRONMENT, words),
    }


PROC: Final = "mount -t proc -o nosuid,nodev,noexec{} proc /proc"
CGROUP2: Final = "umount -R -l /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup"
HYBRID: Final = """
v1=$(sed -n 's/^[1-9][0-9]*:\\([^:]\\{1,\\}\\):.*/\\1/p' /proc/self/cgroup | head -n 1)
mount -t tmpfs cgroup /sys/fs/cgroup; mkdir /sys/fs/cgroup/old /sys/fs/cgroup/new
mount -t cgroup -o "$v1" cgroup /sys/fs/cgroup/old; mount -t cgroup2 cgroup2 /sys/fs/cgroup/new
"""
DEV: Final = """
mount -t tmpfs -o mode=755 dev /dev
for each in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 /dev/${each%:*} c 1 ${each#*:}
done
mknod -m 666 /dev/tty c 5 0; ln -s /proc/self/fd /dev/fd
mkdir /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; ln -s pts/ptmx /dev/ptmx
"""
SYS: Final = (
    "umount -R -l /sys; mount -t sysfs{} sysfs /sys; mount -t cgroup2{} cgroup2 /sys/fs/cgroup"
)
ELSEWHERE: Final = """
umount -R -l /sys; mount -t sysfs -o ro sysfs /sys
mkdir "$D/cgroup"; mount -t cgroup2 cgroup2 "$D/cgroup"
"""

OWN_PIDS: Final = ("--pid", "--fork", "--kill-child")
CONTAINER: Final = ("--cgroup", "--net", *OWN_PIDS)
SECCOMP: Final = """
import ctypes, os, struct, sys
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]  # unshare(2)
refusal, permission = 0x50000 + int(sys.argv[1]), 0x7FFF0000
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, refusal), (6, 0, 0, permission)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
assert ctypes.CDLL(None).prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Has unshare(2) fail, as seccomp(2) filters of container runtimes do."""


@dataclass(frozen=True)
class NodeCase:
    outcomes: ExpectedOutcomes
    namespaces: tuple[str, ...] = ()
    """Of its own, besides the mount namespace: words for unshare(1)."""
    script: str = ""
    """What a shell does in there to make it such a node."""
    rights: tuple[str, ...] = ()
    """A program that takes rights away and executes another."""


def without(*capabilities: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set={','.join(f'-{name}' for name in capabilities)}")


def seccomp(errno: int) -> tuple[str, ...]:
    return (sys.executable, "-c", SECCOMP, str(errno))


def some(outcomes: ExpectedOutcomes, *verbs: str) -> ExpectedOutcomes:
    return {verb: outcomes[verb] for verb in verbs}


DOCKER: Final = (
    "chown dac_override fowner fsetid kill setgid setuid setpcap net_raw sys_chroot mknod setfcap"
)
"""What container runtimes leave to root by default."""

NODES: Final[Mapping[str, NodeCase]] = {
    "cgroup v2 alone": NodeCase(WORKS, (), CGROUP2),
    "cgroup v1 beside v2": NodeCase(DEMONSTRATES, (), HYBRID),
    "a cgroup namespace": NodeCase(WORKS, ("--cgroup",), CGROUP2),
    "no loop devices": NodeCase(WITHOUT_LOOP, (), DEV),
    "hidepid=1": NodeCase(WORKS, OWN_PIDS, PROC.format(",hidepid=1"), without("sys_ptrace")),
    "hidepid=2": NodeCase(DEMONSTRATES, OWN_PIDS, PROC.format(",hidepid=2"), without("sys_ptrace")),
    "subset=pid": NodeCase(
        some(refused("a part of /proc is missing: .*without subset=pid"), "serve", "demo"),
        OWN_PIDS,
        PROC.format(",subset=pid"),
    ),
    "no /proc": NodeCase(
        dict.fromkeys(("serve", "demo"), (3, "there is no /proc here: mount -t proc")),
        (),
        "umount -R -l /proc",
    ),
    "read-only /sys": NodeCase(WORKS, (), ELSEWHERE),
    "read-only cgroups": NodeCase(
        {
            **some(refused("no writable cgroup2 mount"), "serve", "request"),
            "alone": (0, "(?s)pid 2\n.*there will be no cgroup"),
            "demo": (0, "34 checks, every one held"),
        },
        (),
        f"{CGROUP2}; mount -o remount,bind,ro /sys/fs/cgroup",
    ),
    "privileged container": NodeCase(
        WITHOUT_LOOP, CONTAINER, f"{PROC.format('')}; {SYS.format('', '')}; {DEV}"
    ),
    "container": NodeCase(
        {
            **some(refused("no writable cgroup2 mount"), "serve", "request"),
            "alone": (125, "CreationFailed: .*unshare.2.: EPERM .*it needs CAP_SYS_ADMIN"),
            "demo": (0, "31 checks, every one held"),  # in a user namespace
        },
        CONTAINER,
        f"{PROC.format('')}; {SYS.format(' -o ro', ' -o ro')}; {DEV}",
        ("setpriv", f"--bounding-set=-all,+{',+'.join(DOCKER.split())}"),
    ),
    "no CAP_SYS_ADMIN": NodeCase(
        some(refused("unshare.2.: EPERM .*it needs CAP_SYS_ADMIN"), "serve", "request", "alone"),
        rights=without("sys_admin"),
    ),
    "no CAP_SYS_CHROOT": NodeCase(
        some(refused("setns.2.: EPERM .*CAP_SYS_CHROOT"), "serve"), rights=without("sys_chroot")
    ),
    "no CAP_NET_ADMIN": NodeCase(
        refused("bring up lo: .*it needs CAP_NET_ADMIN"), rights=without("net_admin")
    ),
    "no namespace left": NodeCase(  # which may pass: what is alive is watched meanwhile
        {
            "serve": SERVES["serve"],
            "run": (125, "unshare.2.: ENOSPC .*raise .*user.max_net_namespaces"),
        },
        ("--user", "--map-root-user", *CONTAINER),
        f"{PROC.format('')}; echo 0 >/proc/sys/user/max_net_namespaces",
    ),
    "seccomp, EPERM": NodeCase(refused("unshare.2.: EPERM .*no seccomp filter"), rights=seccomp(1)),
    "seccomp, ENOSYS": NodeCase(
        some(refused("unshare.2.: ENOSYS"), "serve", "demo"), rights=seccomp(38)
    ),
}


@pytest.fixture
def home(cgroup2: Path, allocation_id: str) -> Iterator[Path]:
    """The cgroup that the programs of a node are in."""
    home = cgroup2 / f"{allocation_id}-home"
    home.mkdir()
    yield home
    kill_all(home)
    wait_until(lambda: remove_cgroup(home))


QUICK: Final = {
    "cgroup v1 beside v2",
    "no loop devices",
    "read-only cgroups",
    "no CAP_SYS_ADMIN",
    "no namespace left",
    "no /proc",
}
"""One for each way in which verbs work or are refused."""


@pytest.mark.clause("NODE-24")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.deep("long")) for name in NODES],
)
def test_basic_verbs_work_or_are_refused_in_words(
    name: str, home: Path, tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    node = NODES[name]
    enter = 'echo 0 >"$HOME_CGROUP/cgroup.procs"; exec unshare --mount "$@"'
    begin = f'set -e\n{node.script}\nexec "$@"'
    program = [sys.executable, "-m", "tests.support.node", allocation_id, tmp_path, image_root]
    done = subprocess.run(
        [
            *("sh", "-e", "-c", enter, "sh", *node.namespaces),
            *("sh", "-c", begin, "sh", *node.rights, *program, *node.outcomes),
        ],
        env=environment(HOME_CGROUP=str(home), D=str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wrong = {
        verb: found[verb]
        for verb, (status, words) in node.outcomes.items()
        if found[verb][0] != status or not re.search(words, found[verb][1])
    }
    assert wrong == {}, done.stderr
